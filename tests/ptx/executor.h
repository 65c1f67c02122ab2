/* Executes decoded PTX on the CPU: one CTA after the other, its warps in turns, 32 lanes of a warp in lockstep.

   Asynchronous operations are as late as PTX allows. cp.async and TMA deliver when somebody waits for them, wgmma reads
   and writes at its wait, and until then their destination is poison. On the way everything is checked that no right
   program does; a finding is reported and the run goes on. The first part of this file stands in engine.py, too. */

#ifndef EXECUTOR_H
#define EXECUTOR_H
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 32
#define ALL_LANES 0xFFFFFFFFu
#define MOST_WARPS 16
#define MOST_FINDINGS 64
#define MOST_BARRIERS 16
/* clocks of a CTA: of its warps, and of what TMA writes on its own */
#define ASYNC MOST_WARPS
#define CLOCKS (MOST_WARPS + 1)
/* shared memory is watched by pairs of bytes: no kernel stores single ones */
#define GRANULE 2
/* where a kernel sees its tensor maps, and how far apart */
#define MAPS 0x7E0000000000ull
#define MAP_BYTES 128

#define OPERATIONS(X) \
  X(MOV) X(PACK) X(UNPACK) X(ADD) X(SUB) X(MUL) X(MAD) X(MULHI) X(MULWIDE) X(MADWIDE) X(MIN) X(MAX) X(DIV) X(REM) \
  X(NEG) X(AND) X(OR) X(XOR) X(NOT) X(SHL) X(SHR) X(BFE) X(PRMT) X(SELP) X(SETP) X(PREDICATE) X(CVT) X(CVTPACK) \
  X(FADD) X(FSUB) X(FMUL) X(FMA) X(FNEG) X(FABS) X(EX2) X(SQRT) X(FDIV) \
  X(LDGLOBAL) X(STGLOBAL) X(LDSHARED) X(STSHARED) X(LDMATRIX) X(STMATRIX) X(MMA) X(SHUFFLE) X(ELECT) \
  X(CPASYNC) X(CPCOMMIT) X(CPWAIT) X(BARRIER) X(NOTHING) X(BRANCH) X(RETURN) \
  X(MBINIT) X(MBINVAL) X(MBEXPECT) X(MBWAIT) X(TMALOAD) X(TMASTORE) X(TMACOMMIT) X(TMAWAIT) X(FENCE) \
  X(WGMMA) X(WGCOMMIT) X(WGWAIT)
enum {
#define X(name) name,
  OPERATIONS(X)
#undef X
  OPERATION_COUNT,
  LAST_ARITHMETIC = FDIV
};

#define TYPES(X) X(S8) X(U16) X(S16) X(U32) X(S32) X(U64) X(S64) X(F16) X(BF16) X(F32)
enum {
#define X(name) name,
  TYPES(X)
#undef X
  TYPE_COUNT
};

#define FINDINGS(X) \
  X(OUTSIDE_GLOBAL, "global address outside of every tensor") \
  X(OUTSIDE_SHARED, "shared address outside of the CTA's memory") \
  X(MISALIGNED, "misaligned address") \
  X(RACE_SHARED, "race in shared memory") \
  X(IN_FLIGHT, "access to bytes that an asynchronous copy is on the way to") \
  X(UNWRITTEN_SHARED, "read of shared memory never written") \
  X(UNWRITTEN_REGISTER, "use of a register never written") \
  X(LANES_MISSING, "operation of a whole warp with lanes missing") \
  X(RACE_GLOBAL, "race in global memory between CTAs") \
  X(DEADLOCK, "deadlock") \
  X(DIVISION, "division by zero") \
  X(MISUSED, "asynchronous operation misused") \
  X(UNFENCED, "ordinary store read asynchronously without a fence") \
  X(ENDLESS, "more instructions than the limit") \
  X(SAME_VALUE, "same value written by several warps")
enum {
#define X(name, words) name,
  FINDINGS(X)
#undef X
  FINDING_COUNT
};

typedef struct { /* registers are units of 32 words; 64-bit ones take two; a predicate is the first word's bits */
  int32_t operation, predicate, negated; /* predicate: its unit, or -1 */
  int32_t results, sources, operands;    /* how many, and where their units begin in Launch.operands */
  int32_t a, b, c, unused;               /* what decode.py says of each operation */
  int64_t offset, source_offset;         /* added to an address, and to that of a copy's source */
} Instruction;

typedef struct { /* memory that a kernel may touch: rows of row_bytes every stride bytes; one block: stride is 0 */
  uint64_t start, bytes, row_bytes, stride;
  uint32_t *writer, *reader; /* of each byte: a CTA's number + 1, or MANY */
} Buffer;
#define MANY 0xFFFFFFFFu

typedef struct { /* the first of its kind at an instruction; other: the second party, and its instruction or -1 */
  int32_t kind, instruction, cta, warp, lane, size, other, other_instruction;
  uint64_t address;
} Finding;

typedef struct { /* of one instruction; least: what as many bytes cost when they lie together */
  uint64_t executed, sectors, least_sectors, waves, least_waves;
} Counts;

typedef struct { /* a tensor map for TMA, two axes, the inner one last */
  uint64_t start;
  int32_t element_bytes, swizzle; /* swizzle in bytes: 0, 32, 64 or 128 */
  int64_t shape[2], stride;       /* stride in elements */
  int32_t box[2];
} TensorMap;

typedef struct {
  const Instruction *instructions;
  const int32_t *operands;
  const uint32_t *registers; /* of a warp that starts */
  const uint8_t *defined;    /* which units of them hold something */
  Buffer *buffers;
  const TensorMap *maps;
  Counts *counts;
  Finding *findings;
  uint64_t limit;
  uint64_t kinds[FINDING_COUNT]; /* how many of each kind */
  int32_t units, warps, shared_bytes, shared_start, buffer_count, map_count, finding_count;
  int32_t thread_unit, cta_unit[3], grid[3]; /* a unit is -1 where the program doesn't ask */
} Launch;

/* ---- what follows is the executor's own ---- */

typedef struct { /* what is known of two bytes of shared memory */
  uint32_t written, step; /* writer's clock (0: never written); its instructions so far, of an ordinary store */
  uint32_t readers;       /* since then, a bit for each warp */
  uint8_t writer, pending;
  int32_t write, read; /* instructions */
} Shadow;

typedef struct { /* a cp.async that nobody has waited for */
  uint32_t to, bytes;
  uint8_t data[16];
  int32_t group, instruction, lane;
} Copy;

typedef struct { /* a wgmma that nobody has waited for */
  int32_t instruction, group, accumulates;
  uint64_t a, b; /* descriptors of its operands in shared memory */
  uint32_t clock[CLOCKS];
} Product;

enum { RUNNING, AT_BARRIER, BLOCKED, DONE };
typedef struct {
  uint32_t *registers, *defined; /* which lanes' were written: of each unit, the lower and the upper part */
  uint8_t *accumulating;         /* units that a wgmma will write */
  uint32_t at, lane_at[LANES], alive;
  int diverged, number, state, barrier;
  uint32_t clock[CLOCKS], steps, fenced_step, fenced_clock[CLOCKS];
  Copy *copies;
  int copy_count, copy_room, copy_group;
  Product *products;
  int product_count, product_room, product_group, store_group;
  uint32_t waits_for, parity; /* the mbarrier of a warp that is BLOCKED */
} Warp;

typedef struct {
  uint32_t address;
  int32_t valid, expected, missing, phase;
  int64_t missing_bytes;
  uint32_t clock[CLOCKS];
} Mbarrier;

typedef struct { /* a TMA copy that has not happened */
  int is_load, warp, instruction, group;
  uint32_t shared, mbarrier;
  const TensorMap *map;
  int32_t column, row;
  uint32_t clock[CLOCKS];
} Bulk;

typedef struct {
  Launch *launch;
  int number;
  uint64_t steps;
  uint8_t *shared;
  Shadow *shadow;
  uint32_t *read_at; /* each warp's clock when it last read each granule */
  Warp *warps;
  Mbarrier mbarriers[MOST_BARRIERS];
  int mbarrier_count;
  Bulk *bulk;
  int bulk_count, bulk_room;
  uint32_t async_clock;
} Cta;

typedef struct { /* where an instruction is executed */
  Cta *cta;
  Warp *warp;
  const Instruction *in;
  const int32_t *operand;
  uint32_t mask; /* lanes that take part */
  int32_t at;
} Step;

/* an operand's 32 lanes, as numbers of a type */
#define LANES_OF(T, index) ((T *)(s->warp->registers + (size_t)LANES * s->operand[index]))
#define EACH_LANE for (int l = 0; l < LANES; l++) if (s->mask >> l & 1)

/* without the test of the mask compilers use vector instructions */
#define LANE_BY_LANE(...) \
  do { \
    if (s->mask == ALL_LANES) for (int l = 0; l < LANES; l++) { __VA_ARGS__; } \
    else EACH_LANE { __VA_ARGS__; } \
    return 1; \
  } while (0)

/* lanes of a register that were written wholly, and how that is noted */
static inline uint32_t known_lanes(const Warp *w, int unit) { return w->defined[2 * unit] & w->defined[2 * unit + 1]; }
static inline void set_known(Warp *w, int unit, uint32_t lanes, uint32_t mask) {
  for (int part = 2 * unit; part < 2 * unit + 2; part++) w->defined[part] = (w->defined[part] & ~mask) | (lanes & mask);
}

/* run.c */
void found(Cta *, int kind, int instruction, int warp, int lane, uint64_t address, int size);
void found_between(Cta *, int kind, int instruction, int warp, int lane, uint64_t address, int size, int other, int by);
void join(uint32_t *clock, const uint32_t *other);
/* arithmetic.c: 0 where the operation is another file's */
int arithmetic(const Step *);
/* bits.c: the same */
int bits(const Step *);
float from_bf16(uint32_t), from_f16(uint32_t);
/* memory.c */
int global_is_open(Cta *, uint64_t address, int bytes, int alignment, int is_write, int instruction, int warp, int lane);
int shared_is_open(Cta *, uint32_t address, int bytes, int alignment, int instruction, int warp, int lane, uint32_t *at);
void read_shared(Cta *, const uint32_t *clock, int reader, uint32_t at, int bytes, int instruction, int lane);
enum { NOW, STARTS, ARRIVES };
void write_shared(Cta *, const uint32_t *clock, int writer, uint32_t at, int bytes, int instruction, int lane, int when,
                  const void *data);
void count_waves(Counts *, const uint32_t *addresses, uint32_t mask, int bytes);
void count_sectors(Counts *, const uint64_t *addresses, uint32_t mask, int bytes);
int memory(const Step *);
/* products.c */
int product(const Step *);
/* copies.c; 0 where the warp is blocked and has to try again */
int copy(const Step *);
void finish_copies(Cta *, Warp *, int groups_left);
int mbarrier_is_past(Cta *, const Warp *);
int deliver_one(Cta *);
void finish_bulk(Cta *);
/* whether an ordinary store may still be invisible to an asynchronous reader */
int is_unfenced(Cta *, const Shadow *, const Warp *reader);
uint32_t swizzled(uint32_t address, int bytes);

#endif
