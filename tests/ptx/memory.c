/* Loads and stores, who may touch which byte when, and what a request costs. */

#include "executor.h"

/* ---- global memory ---- */

static Buffer *buffer_at(Launch *r, uint64_t address, int bytes) {
  /* the next access is mostly to the same tensor */
  static int last;
  for (int i = 0; i < r->buffer_count; i++) {
    int at = (last + i) % r->buffer_count;
    Buffer *b = &r->buffers[at];
    if (address < b->start || address + bytes > b->start + b->bytes) continue;
    if (b->stride && (address - b->start) % b->stride + bytes > b->row_bytes) continue;
    last = at;
    return b;
  }
  return NULL;
}

int global_is_open(Cta *c, uint64_t address, int bytes, int alignment, int is_write, int instruction, int warp, int lane) {
  if (address % alignment) return found(c, MISALIGNED, instruction, warp, lane, address, bytes), 0;
  Buffer *b = buffer_at(c->launch, address, bytes);
  if (!b) return found(c, OUTSIDE_GLOBAL, instruction, warp, lane, address, bytes), 0;
  uint32_t me = c->number + 1;
  uint64_t first = address - b->start;
  for (uint64_t i = first; i < first + bytes; i++) {
    uint32_t writer = b->writer[i], reader = b->reader[i];
    uint32_t other = writer && writer != me ? writer : is_write && reader && reader != me ? reader : 0;
    if (other) {
      found_between(c, RACE_GLOBAL, instruction, warp, lane, address, bytes, other - 1, -1);
      break;
    }
    if (is_write) b->writer[i] = me;
    else b->reader[i] = reader && reader != me ? MANY : me;
  }
  return 1;
}

/* ---- shared memory: an access happens after another if the other's clock has reached whoever makes it ---- */

int shared_is_open(Cta *c, uint32_t address, int bytes, int alignment, int instruction, int warp, int lane, uint32_t *at) {
  uint32_t start = c->launch->shared_start;
  if (address % alignment) return found(c, MISALIGNED, instruction, warp, lane, address, bytes), 0;
  if (address < start || (uint64_t)address + bytes > (uint64_t)start + c->launch->shared_bytes)
    return found(c, OUTSIDE_SHARED, instruction, warp, lane, address, bytes), 0;
  *at = address - start;
  return 1;
}

void read_shared(Cta *c, const uint32_t *clock, int reader, uint32_t at, int bytes, int instruction, int lane) {
  uint32_t now = c->warps[reader].clock[reader];
  for (uint32_t i = at / GRANULE; i <= (at + bytes - 1) / GRANULE; i++) {
    Shadow *w = &c->shadow[i];
    int is_late = w->writer == reader || w->written <= clock[w->writer];
    if (w->pending) found_between(c, IN_FLIGHT, instruction, reader, lane, at, bytes, w->writer, w->write);
    if (!w->written) found(c, UNWRITTEN_SHARED, instruction, reader, lane, at, bytes);
    else if (!is_late) found_between(c, RACE_SHARED, instruction, reader, lane, at, bytes, w->writer, w->write);
    c->read_at[(size_t)i * MOST_WARPS + reader] = now;
    w->readers |= 1u << reader;
    w->read = instruction;
  }
}

/* data: what is written, where it is known. Several warps may store one value in one place, and Triton lets them */
void write_shared(Cta *c, const uint32_t *clock, int writer, uint32_t at, int bytes, int instruction, int lane, int when,
                  const void *data) {
  int kind = data && !memcmp(c->shared + at, data, bytes) ? SAME_VALUE : RACE_SHARED;
  for (uint32_t i = at / GRANULE; i <= (at + bytes - 1) / GRANULE; i++) {
    Shadow *w = &c->shadow[i];
    if (when != ARRIVES && w->pending) found_between(c, IN_FLIGHT, instruction, writer, lane, at, bytes, w->writer, w->write);
    if (w->written && w->writer != writer && w->written > clock[w->writer])
      found_between(c, kind, instruction, writer, lane, at, bytes, w->writer, w->write);
    for (uint32_t left = w->readers; left; left &= left - 1) {
      int reader = __builtin_ctz(left);
      if (reader != writer && c->read_at[(size_t)i * MOST_WARPS + reader] > clock[reader])
        found_between(c, kind, instruction, writer, lane, at, bytes, reader, w->read);
    }
    *w = (Shadow){.written = clock[writer], .step = when == NOW ? c->warps[writer].steps : 0, .writer = writer,
                  .pending = when == STARTS, .write = instruction, .read = w->read};
  }
}

/* ---- what requests cost ---- */

/* lanes go in groups that move 128 bytes, and in one wavefront a bank delivers one word */
void count_waves(Counts *counts, const uint32_t *addresses, uint32_t mask, int bytes) {
  int together = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8, words_each = (bytes + 3) / 4;
  for (int first = 0; first < LANES; first += together) {
    uint32_t words[LANES];
    int count = 0, in_bank[32] = {0}, most = 0;
    for (int l = first; l < first + together; l++) for (int i = 0; i < words_each && mask >> l & 1; i++) {
      uint32_t word = addresses[l] / 4 + i;
      int seen = 0;
      for (int k = 0; k < count && !seen; k++) seen = words[k] == word;
      if (seen) continue;
      words[count++] = word;
      if (++in_bank[word % 32] > most) most = in_bank[word % 32];
    }
    counts->waves += most, counts->least_waves += (count + 31) / 32;
  }
}

void count_sectors(Counts *counts, const uint64_t *addresses, uint32_t mask, int bytes) {
  uint64_t sectors[2 * LANES];
  int count = 0, all = 0;
  for (int l = 0; l < LANES; l++) if (mask >> l & 1) {
    all += bytes;
    for (uint64_t sector = addresses[l] / 32; sector <= (addresses[l] + bytes - 1) / 32; sector++) {
      int seen = 0;
      for (int i = count - 1; i >= 0 && !seen; i--) seen = sectors[i] == sector;
      if (!seen && count < 2 * LANES) sectors[count++] = sector;
    }
  }
  counts->sectors += count, counts->least_sectors += (all + 31) / 32;
}

/* ---- loads and stores: a is the bytes of an element, b their number, c whether registers have 64 bits ---- */

static void to_registers(const Step *s, int lane, const uint8_t *bytes) {
  for (int i = 0; i < s->in->b; i++) {
    uint64_t value = 0;
    memcpy(&value, bytes + i * s->in->a, s->in->a);
    if (s->in->c) LANES_OF(uint64_t, i)[lane] = value;
    else LANES_OF(uint32_t, i)[lane] = (uint32_t)value;
  }
}

static void from_registers(const Step *s, int lane, uint8_t *bytes) {
  for (int i = 0; i < s->in->b; i++) {
    uint64_t value = s->in->c ? LANES_OF(uint64_t, i)[lane] : LANES_OF(uint32_t, i)[lane];
    memcpy(bytes + i * s->in->a, &value, s->in->a);
  }
}

/* the address is the last operand */
#define ADDRESS(T) LANES_OF(T, s->in->results + s->in->sources - 1)

static int access_global(const Step *s) {
  const Instruction *in = s->in;
  int bytes = in->a * in->b, is_write = in->operation == STGLOBAL;
  uint64_t *address = ADDRESS(uint64_t), at[LANES];
  EACH_LANE {
    uint8_t data[16];
    /* what a forbidden load gives is NaN */
    memset(data, 0xFF, sizeof data);
    at[l] = address[l] + in->offset;
    int open = global_is_open(s->cta, at[l], bytes, bytes, is_write, s->at, s->warp->number, l);
    if (open && is_write) from_registers(s, l, (uint8_t *)at[l]);
    if (open && !is_write) memcpy(data, (void *)at[l], bytes);
    if (!is_write) to_registers(s, l, data);
  }
  count_sectors(&s->cta->launch->counts[s->at], at, s->mask, bytes);
  return 1;
}

static int access_shared(const Step *s) {
  const Instruction *in = s->in;
  int bytes = in->a * in->b, is_write = in->operation == STSHARED, me = s->warp->number;
  uint32_t *address = ADDRESS(uint32_t), at[LANES], place;
  EACH_LANE {
    uint8_t data[16];
    memset(data, 0xFF, sizeof data);
    at[l] = address[l] + (uint32_t)in->offset;
    int open = shared_is_open(s->cta, at[l], bytes, bytes, s->at, me, l, &place);
    if (open && is_write) {
      from_registers(s, l, data);
      write_shared(s->cta, s->warp->clock, me, place, bytes, s->at, l, NOW, data);
      memcpy(s->cta->shared + place, data, bytes);
    }
    if (open && !is_write) {
      read_shared(s->cta, s->warp->clock, me, place, bytes, s->at, l);
      memcpy(data, s->cta->shared + place, bytes);
    }
    if (!is_write) to_registers(s, l, data);
  }
  count_waves(&s->cta->launch->counts[s->at], at, s->mask, bytes);
  return 1;
}

/* a: how many 8 × 8 matrices of 16-bit numbers, b: whether transposed. Lane 8·i + j has the address of row j of matrix i;
   a register holds two neighbours of a row: lane 4·j + t those of row j in columns 2·t and 2·t + 1 */
static int access_matrices(const Step *s) {
  const Instruction *in = s->in;
  int is_write = in->operation == STMATRIX, me = s->warp->number;
  uint32_t *address = ADDRESS(uint32_t), result[4][LANES], place;
  if (s->mask != ALL_LANES) return found(s->cta, LANES_MISSING, s->at, me, 0, s->mask, 0), 1;
  for (int i = 0; i < in->a; i++) {
    uint16_t matrix[8][8];
    uint32_t rows[LANES];
    for (int l = 0; l < LANES && is_write; l++) for (int half = 0; half < 2; half++) {
      int row = l / 4, col = 2 * (l % 4) + half;
      uint16_t value = LANES_OF(uint32_t, i)[l] >> 16 * half;
      if (in->b) matrix[col][row] = value;
      else matrix[row][col] = value;
    }
    for (int j = 0; j < 8; j++) {
      rows[j] = address[8 * i + j] + (uint32_t)in->offset;
      if (!shared_is_open(s->cta, rows[j], 16, 16, s->at, me, 8 * i + j, &place)) {
        if (!is_write) memset(matrix[j], 0xFF, 16);
      } else if (is_write) {
        write_shared(s->cta, s->warp->clock, me, place, 16, s->at, 8 * i + j, NOW, matrix[j]);
        memcpy(s->cta->shared + place, matrix[j], 16);
      } else {
        read_shared(s->cta, s->warp->clock, me, place, 16, s->at, 8 * i + j);
        memcpy(matrix[j], s->cta->shared + place, 16);
      }
    }
    count_waves(&s->cta->launch->counts[s->at], rows, 0xFF, 16);
    for (int l = 0; l < LANES && !is_write; l++) {
      int row = l / 4, col = 2 * (l % 4);
      result[i][l] = in->b ? matrix[col][row] | (uint32_t)matrix[col + 1][row] << 16
                           : matrix[row][col] | (uint32_t)matrix[row][col + 1] << 16;
    }
  }
  /* not before: a result may be the register of the addresses */
  for (int i = 0; i < in->a && !is_write; i++) memcpy(LANES_OF(uint32_t, i), result[i], sizeof result[i]);
  return 1;
}

int memory(const Step *s) {
  switch (s->in->operation) {
  case LDGLOBAL: case STGLOBAL: return access_global(s);
  case LDSHARED: case STSHARED: return access_shared(s);
  case LDMATRIX: case STMATRIX: return access_matrices(s);
  }
  return 0;
}
