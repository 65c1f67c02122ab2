/* Matrix instructions. mma computes at once; wgmma reads its operands and writes its sums when somebody waits for it. */

#include "executor.h"

/* register i of a fragment of A, 16 × 16: lane 4·g + t holds row g + 8·(i & 1), columns 2·t + 8·(i >> 1) and the next */
#define ROW(l, i) ((l) / 4 + 8 * ((i) & 1))
#define COL(l, i) (2 * ((l) % 4) + 8 * ((i) >> 1))

static float half_of(uint32_t word, int upper, int type) {
  uint32_t half = upper ? word >> 16 : word & 0xFFFF;
  return type == BF16 ? from_bf16(half) : from_f16(half);
}

static void fragment_a(const Warp *w, const int32_t *units, int type, float a[16][16]) {
  for (int l = 0; l < LANES; l++) for (int i = 0; i < 4; i++) for (int h = 0; h < 2; h++)
    a[ROW(l, i)][COL(l, i) + h] = half_of(w->registers[(size_t)units[i] * LANES + l], h, type);
}

/* products of 16-bit numbers are exact in fp32, and each is added with one rounding: D[16, n] += A[16, 16]·B[16, n] */
static void add_products(float *d, int width, const float a[16][16], const float *b) {
  for (int k = 0; k < 16; k++) for (int i = 0; i < 16; i++) {
    float factor = a[i][k];
    for (int j = 0; j < width; j++) d[i * width + j] = fmaf(factor, b[k * width + j], d[i * width + j]);
  }
}

/* 16 × 8 sums: registers 0 and 1 are neighbours in row g, 2 and 3 in row g + 8; wgmma has them for every 8 columns */
static void sums_from(const Warp *w, const int32_t *units, int width, float *d) {
  for (int l = 0; l < LANES; l++) for (int j = 0; j < width / 8; j++) for (int i = 0; i < 4; i++)
    memcpy(&d[(l / 4 + 8 * (i >> 1)) * width + 8 * j + 2 * (l % 4) + (i & 1)],
           &w->registers[(size_t)units[4 * j + i] * LANES + l], 4);
}
static void sums_to(Warp *w, const int32_t *units, int width, const float *d) {
  for (int l = 0; l < LANES; l++) for (int j = 0; j < width / 8; j++) for (int i = 0; i < 4; i++)
    memcpy(&w->registers[(size_t)units[4 * j + i] * LANES + l],
           &d[(l / 4 + 8 * (i >> 1)) * width + 8 * j + 2 * (l % 4) + (i & 1)], 4);
}

static void mma(const Step *s) { /* a: type. Operands: 4 of D, 4 of A, 2 of B, 4 of C */
  float a[16][16], b[16][8], d[16 * 8];
  fragment_a(s->warp, s->operand + 4, s->in->a, a);
  for (int l = 0; l < LANES; l++) for (int i = 0; i < 2; i++) for (int h = 0; h < 2; h++)
    b[2 * (l % 4) + h + 8 * i][l / 4] = half_of(LANES_OF(uint32_t, 8 + i)[l], h, s->in->a);
  sums_from(s->warp, s->operand + 10, 8, d);
  add_products(d, 8, a, b[0]);
  sums_to(s->warp, s->operand, 8, d);
}

/* address of element (row, k) of an operand in shared memory, as its descriptor says; rows are A's, or B's columns.
   turned: rows and not k lie together */
static uint32_t operand_address(uint64_t descriptor, int row, int k, int turned) {
  static const int swizzles[] = {0, 128, 64, 32};
  uint32_t start = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4,
           stride = (descriptor >> 32 & 0x3FFF) << 4;
  int bytes = swizzles[descriptor >> 62];
  if (!bytes && !turned) return start + row / 8 * stride + row % 8 * 16 + k / 8 * leading + k % 8 * 2;
  if (!bytes) return start + row / 8 * stride + row % 8 * 2 + k / 8 * leading + k % 8 * 16;
  if (!turned) return swizzled(start + row / 8 * stride + row % 8 * bytes + k * 2, bytes);
  return swizzled(start + row / (bytes / 2) * leading + row % (bytes / 2) * 2 + k / 8 * stride + k % 8 * bytes, bytes);
}

/* eight numbers that lie together, which no swizzle takes apart: rows row … row + 7 if turned, else k … k + 7 */
static void eight_of(Cta *c, Warp *w, const Product *p, uint64_t descriptor, int row, int k, int turned, float *eight) {
  uint32_t address = operand_address(descriptor, row, k, turned), at;
  int type = c->launch->instructions[p->instruction].a;
  for (int i = 0; i < 8; i++) eight[i] = NAN;
  if (!shared_is_open(c, address, 16, 16, p->instruction, w->number, 0, &at)) return;
  for (int i = 0; i < 16 / GRANULE; i++)
    if (is_unfenced(c, &c->shadow[at / GRANULE + i], w)) {
      found(c, UNFENCED, p->instruction, w->number, 0, address, 16);
      break;
    }
  read_shared(c, p->clock, w->number, at, 16, p->instruction, 0);
  for (int i = 0; i < 8; i++) {
    uint16_t half;
    memcpy(&half, c->shared + at + 2 * i, 2);
    eight[i] = half_of(half, 0, type);
  }
}

/* this warp's 16 of the 64 rows. a: type, b: columns, c: whether A is in registers, A is turned, B is turned */
static void finish_product(Cta *c, Warp *w, const Product *p) {
  const Instruction *in = &c->launch->instructions[p->instruction];
  const int32_t *units = c->launch->operands + in->operands;
  int width = in->b, a_in_registers = in->c & 1, a_turned = in->c >> 1 & 1, b_turned = in->c >> 2 & 1;
  int first = w->number % 4 * 16;
  static float a[16][16], b[16 * 256], d[16 * 256];
  float eight[8];
  if (a_in_registers) fragment_a(w, units + in->results, in->a, a);
  else for (int i = 0; i < 32; i++) { /* 16 × 16 numbers */
    int row = a_turned ? i % 2 * 8 : i / 2, k = a_turned ? i / 2 : i % 2 * 8;
    eight_of(c, w, p, p->a, first + row, k, a_turned, eight);
    for (int j = 0; j < 8; j++) a[a_turned ? row + j : row][a_turned ? k : k + j] = eight[j];
  }
  for (int i = 0; i < 2 * width; i++) { /* 16 × width */
    int col = b_turned ? i / 16 * 8 : i / 2, k = b_turned ? i % 16 : i % 2 * 8;
    eight_of(c, w, p, p->b, col, k, b_turned, eight);
    for (int j = 0; j < 8; j++) b[(b_turned ? k : k + j) * width + (b_turned ? col + j : col)] = eight[j];
  }
  if (p->accumulates) sums_from(w, units, width, d);
  else memset(d, 0, sizeof(float) * 16 * width);
  add_products(d, width, a, b);
  sums_to(w, units, width, d);
}

static void mark_sums(const Cta *c, Warp *w, const Product *p, int are_there) {
  const Instruction *in = &c->launch->instructions[p->instruction];
  const int32_t *units = c->launch->operands + in->operands;
  for (int i = 0; i < in->results; i++) {
    set_known(w, units[i], are_there ? ALL_LANES : 0, ALL_LANES);
    w->accumulating[units[i]] = !are_there;
  }
}

static void start_product(const Step *s) {
  Warp *w = s->warp;
  const Instruction *in = s->in;
  if (s->mask != ALL_LANES) {
    found(s->cta, LANES_MISSING, s->at, w->number, 0, s->mask, 0);
    return;
  }
  if (w->product_count == w->product_room) {
    w->product_room = 2 * w->product_room + 16;
    w->products = realloc(w->products, sizeof(Product) * w->product_room);
  }
  int a_in_registers = in->c & 1, next = in->results + (a_in_registers ? 4 : 0);
  Product *p = &w->products[w->product_count++];
  *p = (Product){.instruction = s->at, .group = w->product_group};
  if (!a_in_registers) p->a = *LANES_OF(uint64_t, next++);
  p->b = *LANES_OF(uint64_t, next++);
  uint32_t accumulates = *LANES_OF(uint32_t, next);
  if (accumulates != 0 && accumulates != ALL_LANES) found(s->cta, LANES_MISSING, s->at, w->number, 0, accumulates, 0);
  p->accumulates = accumulates & 1;
  for (int i = 0; i < in->results && p->accumulates; i++)
    if (!known_lanes(w, s->operand[i]) && !w->accumulating[s->operand[i]])
      found(s->cta, UNWRITTEN_REGISTER, s->at, w->number, 0, i, 0);
  memcpy(p->clock, w->clock, sizeof p->clock);
  mark_sums(s->cta, w, p, 0);
}

static void wait_for_products(const Step *s) {
  Warp *w = s->warp;
  int kept = 0;
  for (int i = 0; i < w->product_count; i++) {
    Product p = w->products[i];
    if (p.group >= w->product_group - (int)s->in->offset) {
      w->products[kept++] = p;
      continue;
    }
    finish_product(s->cta, w, &p);
    mark_sums(s->cta, w, &p, 1);
  }
  w->product_count = kept;
  /* another product still adds to the same sums */
  for (int i = 0; i < kept; i++) mark_sums(s->cta, w, &w->products[i], 0);
}

int product(const Step *s) {
  switch (s->in->operation) {
  case MMA:
    if (s->mask != ALL_LANES) found(s->cta, LANES_MISSING, s->at, s->warp->number, 0, s->mask, 0);
    else mma(s);
    return 1;
  case WGMMA: start_product(s); return 1;
  case WGCOMMIT: s->warp->product_group++; return 1;
  case WGWAIT: wait_for_products(s); return 1;
  }
  return 0;
}
