/* Shifts, fields of bits and permuted bytes. */

#include "executor.h"

/* n bits of x, from bit p on; signed ones are extended from the highest of them that exists */
static uint64_t bit_field(uint64_t x, uint32_t p, uint32_t n, int width, int is_signed) {
  if (n == 0) return 0;
  if (p >= (uint32_t)width) return is_signed && x >> (width - 1) & 1 ? ~0ull : 0;
  if (n > width - p) n = width - p;
  uint64_t field = x >> p;
  if (n == 64) return field;
  field &= (1ull << n) - 1;
  return is_signed && field >> (n - 1) & 1 ? field | ~((1ull << n) - 1) : field;
}

static int take_bits(const Step *s) {
  const Instruction *in = s->in;
  int width = in->a >= U64 ? 64 : 32, is_signed = in->a == S32 || in->a == S64;
  uint32_t *p = LANES_OF(uint32_t, 2), *n = LANES_OF(uint32_t, 3);
  if (width == 64) {
    uint64_t *d = LANES_OF(uint64_t, 0), *x = LANES_OF(uint64_t, 1);
    LANE_BY_LANE(d[l] = bit_field(x[l], p[l] & 255, n[l] & 255, 64, is_signed));
  }
  uint32_t *d = LANES_OF(uint32_t, 0), *x = LANES_OF(uint32_t, 1);
  LANE_BY_LANE(d[l] = (uint32_t)bit_field(x[l], p[l] & 255, n[l] & 255, 32, is_signed));
}

static int shift(const Step *s) {
  const Instruction *in = s->in;
  /* however wide the number is, the distance has 32 bits, and all bits can be shifted out */
  uint32_t *y = LANES_OF(uint32_t, 2), kept = in->a == U16 ? 0xFFFF : ALL_LANES;
  int left = in->operation == SHL;
#define SHIFT(T, e) do { T *d = LANES_OF(T, 0), *x = LANES_OF(T, 1); LANE_BY_LANE(d[l] = (e)); } while (0)
  switch (in->a) {
  case S64: SHIFT(int64_t, x[l] >> (y[l] > 63 ? 63 : y[l]));
  case U64:
    if (left) SHIFT(uint64_t, y[l] > 63 ? 0 : x[l] << y[l]);
    SHIFT(uint64_t, y[l] > 63 ? 0 : x[l] >> y[l]);
  case S32: SHIFT(int32_t, x[l] >> (y[l] > 31 ? 31 : y[l]));
  case S16: SHIFT(uint32_t, (uint32_t)((int16_t)x[l] >> (y[l] > 15 ? 15 : y[l])) & 0xFFFF);
  default:
    if (left) SHIFT(uint32_t, y[l] > 31 ? 0 : x[l] << y[l] & kept);
    SHIFT(uint32_t, y[l] > 31 ? 0 : x[l] >> y[l]);
  }
}

/* a byte of two registers for each digit of z; its highest bit asks for the byte's sign instead */
static uint32_t permute(uint32_t x, uint32_t y, uint32_t z) {
  uint64_t bytes = x | (uint64_t)y << 32;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) {
    uint32_t digit = z >> 4 * i & 15, byte = bytes >> 8 * (digit & 7) & 255;
    if (digit & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}

int bits(const Step *s) {
  switch (s->in->operation) {
  case SHL: case SHR: return shift(s);
  case BFE: return take_bits(s);
  case PRMT: {
    uint32_t *d = LANES_OF(uint32_t, 0), *x = LANES_OF(uint32_t, 1), *y = LANES_OF(uint32_t, 2), *z = LANES_OF(uint32_t, 3);
    LANE_BY_LANE(d[l] = permute(x[l], y[l], z[l]));
  }
  }
  return 0;
}
