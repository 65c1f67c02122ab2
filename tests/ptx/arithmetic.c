/* Moves, integers, predicates, floating point and conversions: what a lane does alone. */

#include "executor.h"

#define UNARY(T, e) do { T *d = LANES_OF(T, 0), *x = LANES_OF(T, 1); LANE_BY_LANE(d[l] = (e)); } while (0)
#define BINARY(T, e) \
  do { T *d = LANES_OF(T, 0), *x = LANES_OF(T, 1), *y = LANES_OF(T, 2); LANE_BY_LANE(d[l] = (e)); } while (0)
#define TERNARY(T, e) \
  do { \
    T *d = LANES_OF(T, 0), *x = LANES_OF(T, 1), *y = LANES_OF(T, 2), *z = LANES_OF(T, 3); \
    LANE_BY_LANE(d[l] = (e)); \
  } while (0)
/* the same at each width; a 16-bit number is the lower half of a word whose upper half is 0 */
#define AT_EACH_WIDTH(KIND, e) \
  do { \
    if (in->a >= U64) KIND(uint64_t, e); \
    if (in->a >= U32) KIND(uint32_t, e); \
    KIND(uint32_t, (e) & 0xFFFF); \
  } while (0)
/* and where the sign matters; a is the type */
#define WITH_SIGN(KIND, e) \
  do { \
    switch (in->a) { \
    case U64: KIND(uint64_t, e); \
    case S64: KIND(int64_t, e); \
    case S32: KIND(int32_t, e); \
    default: KIND(uint32_t, e); \
    } \
  } while (0)

static float as_float(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
static uint32_t as_bits(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }
static float flushed(float f) { return fabsf(f) < 0x1p-126f ? copysignf(0.f, f) : f; }
float from_bf16(uint32_t h) { return as_float(h << 16); }
float from_f16(uint32_t h) {
  uint16_t half = h;
  _Float16 f;
  memcpy(&f, &half, 2);
  return (float)f;
}
static uint32_t to_bf16(float f) {
  uint32_t bits = as_bits(f);
  /* to the nearest, ties to even */
  return f != f ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
static uint32_t to_f16(float f) {
  _Float16 h = (_Float16)f;
  uint16_t half;
  memcpy(&half, &h, 2);
  return f != f ? 0x7FFF : half;
}

/* floating point: a says whether subnormal numbers count as 0, of arguments and results */
#define FLOAT_1(e) \
  do { \
    uint32_t *d = LANES_OF(uint32_t, 0), *p = LANES_OF(uint32_t, 1); \
    if (in->a) LANE_BY_LANE(float x = flushed(as_float(p[l])); d[l] = as_bits(flushed(e))); \
    LANE_BY_LANE(float x = as_float(p[l]); d[l] = as_bits(e)); \
  } while (0)
#define FLOAT_2(e) \
  do { \
    uint32_t *d = LANES_OF(uint32_t, 0), *p = LANES_OF(uint32_t, 1), *q = LANES_OF(uint32_t, 2); \
    if (in->a) LANE_BY_LANE(float x = flushed(as_float(p[l])); float y = flushed(as_float(q[l])); \
                            d[l] = as_bits(flushed(e))); \
    LANE_BY_LANE(float x = as_float(p[l]); float y = as_float(q[l]); d[l] = as_bits(e)); \
  } while (0)

static int fused_multiply_add(const Step *s) {
  const Instruction *in = s->in;
  uint32_t *d = LANES_OF(uint32_t, 0), *p = LANES_OF(uint32_t, 1), *q = LANES_OF(uint32_t, 2), *r = LANES_OF(uint32_t, 3);
  if (in->a)
    LANE_BY_LANE(d[l] = as_bits(flushed(
                     fmaf(flushed(as_float(p[l])), flushed(as_float(q[l])), flushed(as_float(r[l]))))));
  LANE_BY_LANE(d[l] = as_bits(fmaf(as_float(p[l]), as_float(q[l]), as_float(r[l]))));
}

static int divide(const Step *s) {
  const Instruction *in = s->in;
  /* both 32-bit types fit the signed 64-bit one */
  EACH_LANE {
    int64_t x, y;
    if (in->a >= U64) x = LANES_OF(int64_t, 1)[l], y = LANES_OF(int64_t, 2)[l];
    else if (in->a == S32) x = LANES_OF(int32_t, 1)[l], y = LANES_OF(int32_t, 2)[l];
    else x = LANES_OF(uint32_t, 1)[l], y = LANES_OF(uint32_t, 2)[l];
    if (y == 0) { found(s->cta, DIVISION, s->at, s->warp->number, l, 0, 0); y = 1; }
    uint64_t result;
    if (in->a == U64) result = in->operation == REM ? (uint64_t)x % (uint64_t)y : (uint64_t)x / (uint64_t)y;
    /* the one quotient that doesn't fit would stop this process */
    else if (y == -1) result = in->operation == REM ? 0 : 0 - (uint64_t)x;
    else result = (uint64_t)(in->operation == REM ? x % y : x / y);
    if (in->a >= U64) LANES_OF(uint64_t, 0)[l] = result;
    else LANES_OF(uint32_t, 0)[l] = (uint32_t)result;
  }
  return 1;
}

static int holds(int comparison, int less, int equal, int unordered) {
  return comparison == 0 ? equal : comparison == 1 ? !equal && !unordered : comparison == 2 ? less
         : comparison == 3 ? less || equal : comparison == 4 ? !less && !equal && !unordered : !less && !unordered;
}

/* a: type; b: comparison, + 8 where it holds for NaN, too, + 16 of the upper halves; c: subnormals count as 0 */
static int compare(const Step *s) {
  const Instruction *in = s->in;
  uint32_t result = 0;
  int comparison = in->b & 7; /* numbered as arithmetic.py has them */
#define COMPARE(T, KEPT) \
  for (int l = 0; l < LANES; l++) { \
    T x = LANES_OF(KEPT, 1)[l], y = LANES_OF(KEPT, 2)[l]; \
    result |= (uint32_t)holds(comparison, x < y, x == y, 0) << l; \
  } \
  break
  switch (in->a) {
  case U16: COMPARE(uint16_t, uint32_t);
  case S16: COMPARE(int16_t, uint32_t);
  case U32: COMPARE(uint32_t, uint32_t);
  case S32: COMPARE(int32_t, int32_t);
  case U64: COMPARE(uint64_t, uint64_t);
  case S64: COMPARE(int64_t, int64_t);
  default:
    for (int l = 0; l < LANES; l++) {
      uint32_t p = LANES_OF(uint32_t, 1)[l] >> (in->b & 16), q = LANES_OF(uint32_t, 2)[l] >> (in->b & 16);
      float x = in->a == F32 ? as_float(p) : in->a == F16 ? from_f16(p) : from_bf16(p);
      float y = in->a == F32 ? as_float(q) : in->a == F16 ? from_f16(q) : from_bf16(q);
      if (in->c) x = flushed(x), y = flushed(y);
      int unordered = x != x || y != y;
      result |= (uint32_t)(holds(comparison, x < y, x == y, unordered) || (unordered && in->b & 8)) << l;
    }
  }
  uint32_t *d = LANES_OF(uint32_t, 0);
  *d = (*d & ~s->mask) | (result & s->mask);
  return 1;
}

static int predicates(const Step *s) { /* a: what is done with one or two */
  uint32_t *d = LANES_OF(uint32_t, 0), x = *LANES_OF(uint32_t, 1), y = s->in->sources > 1 ? *LANES_OF(uint32_t, 2) : 0;
  uint32_t result = s->in->a == MOV ? x : s->in->a == NOT ? ~x : s->in->a == AND ? x & y : s->in->a == OR ? x | y : x ^ y;
  *d = (*d & ~s->mask) | (result & s->mask);
  return 1;
}

static int convert(const Step *s) { /* from type a to type b */
  const Instruction *in = s->in;
#define CONVERT(T, F, e) do { T *d = LANES_OF(T, 0); F *x = LANES_OF(F, 1); LANE_BY_LANE(d[l] = (e)); } while (0)
  if (in->a == F32 && in->b == BF16) CONVERT(uint32_t, uint32_t, to_bf16(as_float(x[l])));
  if (in->a == F32) CONVERT(uint32_t, uint32_t, to_f16(as_float(x[l])));
  if (in->a == BF16) CONVERT(uint32_t, uint32_t, x[l] << 16);
  if (in->a == F16) CONVERT(uint32_t, uint32_t, as_bits(from_f16(x[l])));
  if (in->a == S8) CONVERT(uint32_t, uint32_t, (uint32_t)(int8_t)x[l]);
  if (in->b == F32 && in->a == S32) CONVERT(float, int32_t, (float)x[l]);
  if (in->b == F32) CONVERT(float, uint32_t, (float)x[l]);
  /* integers: what is wider is extended as the source's type says */
  if (in->b >= U64) {
    if (in->a == S32) CONVERT(int64_t, int32_t, x[l]);
    if (in->a == S16) CONVERT(int64_t, uint32_t, (int16_t)x[l]);
    CONVERT(uint64_t, uint32_t, x[l]);
  }
  uint32_t kept = in->b <= S16 ? 0xFFFF : ALL_LANES;
  if (in->a >= U64) CONVERT(uint32_t, uint64_t, (uint32_t)x[l] & kept);
  if (in->a == S16) CONVERT(uint32_t, uint32_t, (uint32_t)(int16_t)x[l] & kept);
  CONVERT(uint32_t, uint32_t, x[l] & kept);
}

static int pack(const Step *s) { /* into one register of a bits, b at a time */
  const Instruction *in = s->in;
  EACH_LANE {
    uint64_t whole = 0;
    for (int i = 0; i < in->sources; i++)
      whole |= (LANES_OF(uint32_t, 1 + i)[l] & (uint64_t)((1ull << in->b) - 1)) << in->b * i;
    if (in->a == 64) LANES_OF(uint64_t, 0)[l] = whole;
    else LANES_OF(uint32_t, 0)[l] = (uint32_t)whole;
  }
  return 1;
}

static int unpack(const Step *s) { /* the opposite */
  const Instruction *in = s->in;
  EACH_LANE {
    uint64_t whole = in->a == 64 ? LANES_OF(uint64_t, in->results)[l] : LANES_OF(uint32_t, in->results)[l];
    for (int i = 0; i < in->results; i++)
      LANES_OF(uint32_t, i)[l] = (uint32_t)(whole >> in->b * i & ((1ull << in->b) - 1));
  }
  return 1;
}

static int select_by_predicate(const Step *s) {
  uint32_t chosen = *LANES_OF(uint32_t, 3);
  if (s->in->a >= U64) {
    uint64_t *d = LANES_OF(uint64_t, 0), *x = LANES_OF(uint64_t, 1), *y = LANES_OF(uint64_t, 2);
    LANE_BY_LANE(d[l] = chosen >> l & 1 ? x[l] : y[l]);
  }
  uint32_t *d = LANES_OF(uint32_t, 0), *x = LANES_OF(uint32_t, 1), *y = LANES_OF(uint32_t, 2);
  LANE_BY_LANE(d[l] = chosen >> l & 1 ? x[l] : y[l]);
}

/* the upper half of a product, or all of it, plus a number as wide */
static int multiply_wide(const Step *s) {
  const Instruction *in = s->in;
  if (in->operation == MULHI) {
    if (in->a == U64) BINARY(uint64_t, (uint64_t)((unsigned __int128)x[l] * y[l] >> 64));
    if (in->a == S32) BINARY(int32_t, (int32_t)((int64_t)x[l] * y[l] >> 32));
    BINARY(uint32_t, (uint32_t)((uint64_t)x[l] * y[l] >> 32));
  }
  uint64_t *d = LANES_OF(uint64_t, 0), *z = in->operation == MADWIDE ? LANES_OF(uint64_t, 3) : NULL;
  uint32_t *x = LANES_OF(uint32_t, 1), *y = LANES_OF(uint32_t, 2);
  if (in->a == S32) LANE_BY_LANE(d[l] = (uint64_t)((int64_t)(int32_t)x[l] * (int32_t)y[l]) + (z ? z[l] : 0));
  LANE_BY_LANE(d[l] = (uint64_t)x[l] * y[l] + (z ? z[l] : 0));
}

int arithmetic(const Step *s) {
  const Instruction *in = s->in;
  switch (in->operation) {
  case MOV: AT_EACH_WIDTH(UNARY, x[l]);
  case PACK: return pack(s);
  case UNPACK: return unpack(s);
  case ADD: AT_EACH_WIDTH(BINARY, x[l] + y[l]);
  case SUB: AT_EACH_WIDTH(BINARY, x[l] - y[l]);
  case MUL: AT_EACH_WIDTH(BINARY, x[l] * y[l]);
  case MAD: AT_EACH_WIDTH(TERNARY, x[l] * y[l] + z[l]);
  case MULHI: case MULWIDE: case MADWIDE: return multiply_wide(s);
  case MIN: WITH_SIGN(BINARY, x[l] < y[l] ? x[l] : y[l]);
  case MAX: WITH_SIGN(BINARY, x[l] > y[l] ? x[l] : y[l]);
  case DIV: case REM: return divide(s);
  case NEG: AT_EACH_WIDTH(UNARY, 0 - x[l]);
  case AND: AT_EACH_WIDTH(BINARY, x[l] & y[l]);
  case OR: AT_EACH_WIDTH(BINARY, x[l] | y[l]);
  case XOR: AT_EACH_WIDTH(BINARY, x[l] ^ y[l]);
  case NOT: AT_EACH_WIDTH(UNARY, ~x[l]);
  case SELP: return select_by_predicate(s);
  case SETP: return compare(s);
  case PREDICATE: return predicates(s);
  case CVT: return convert(s);
  case CVTPACK: { /* two numbers into one register, the first above */
    uint32_t *d = LANES_OF(uint32_t, 0), *x = LANES_OF(uint32_t, 1), *y = LANES_OF(uint32_t, 2);
    if (in->a == BF16) LANE_BY_LANE(d[l] = to_bf16(as_float(x[l])) << 16 | to_bf16(as_float(y[l])));
    LANE_BY_LANE(d[l] = to_f16(as_float(x[l])) << 16 | to_f16(as_float(y[l])));
  }
  case FADD: FLOAT_2(x + y);
  case FSUB: FLOAT_2(x - y);
  case FMUL: FLOAT_2(x * y);
  case FMA: return fused_multiply_add(s);
  case FNEG: UNARY(uint32_t, x[l] ^ 0x80000000u);
  case FABS: FLOAT_1(fabsf(x));
  /* a GPU's are approximate; here they are rounded once */
  case EX2: FLOAT_1((float)exp2((double)x));
  case SQRT: FLOAT_1((float)sqrt((double)x));
  case FDIV: FLOAT_2(x / y);
  }
  return bits(s);
}
