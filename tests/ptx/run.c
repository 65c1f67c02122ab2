/* Warps, their lanes' ways, barriers and the grid. */

#include "executor.h"

void found_between(Cta *c, int kind, int instruction, int warp, int lane, uint64_t address, int size, int other, int by) {
  Launch *r = c->launch;
  r->kinds[kind]++;
  for (int i = 0; i < r->finding_count; i++)
    if (r->findings[i].kind == kind && r->findings[i].instruction == instruction) return;
  if (r->finding_count == MOST_FINDINGS) return;
  r->findings[r->finding_count++] = (Finding){kind, instruction, c->number, warp, lane, size, other, by, address};
}

void found(Cta *c, int kind, int instruction, int warp, int lane, uint64_t address, int size) {
  found_between(c, kind, instruction, warp, lane, address, size, -1, -1);
}

void join(uint32_t *clock, const uint32_t *other) {
  for (int i = 0; i < CLOCKS; i++) if (other[i] > clock[i]) clock[i] = other[i];
}

/* lanes that are furthest behind go first, so that ways meet again as early as they can */
static uint32_t next_lanes(Warp *w) {
  if (!w->diverged) return w->alive;
  uint32_t first = UINT32_MAX, mask = 0;
  for (int l = 0; l < LANES; l++) if (w->alive >> l & 1 && w->lane_at[l] < first) first = w->lane_at[l];
  for (int l = 0; l < LANES; l++) if (w->alive >> l & 1 && w->lane_at[l] == first) mask |= 1u << l;
  w->at = first;
  w->diverged = mask != w->alive;
  return mask;
}

static void go_on(Warp *w, uint32_t lanes, uint32_t at) {
  if (!w->diverged) w->at = at;
  else for (int l = 0; l < LANES; l++) if (lanes >> l & 1) w->lane_at[l] = at;
}

static void branch(Warp *w, uint32_t lanes, uint32_t taken, uint32_t to) {
  uint32_t here = w->at;
  if (!w->diverged && taken && taken != lanes) {
    w->diverged = 1;
    for (int l = 0; l < LANES; l++) w->lane_at[l] = here;
  }
  go_on(w, lanes & ~taken, here + 1);
  if (taken) go_on(w, taken, to);
}

static void arrive_at_barrier(const Step *s) { /* operands: which of the CTA's barriers, how many threads meet there */
  Cta *c = s->cta;
  Warp *w = s->warp;
  int barrier = s->in->sources ? (int)*LANES_OF(uint32_t, 0) : 0, warps = c->launch->warps, waiting = 0;
  int wanted = s->in->sources > 1 ? (int)*LANES_OF(uint32_t, 1) : LANES * warps;
  uint32_t all[CLOCKS] = {0};
  if (w->diverged || s->mask != w->alive) found(c, LANES_MISSING, s->at, w->number, 0, s->mask, 0);
  w->state = AT_BARRIER, w->barrier = barrier;
  w->at++, w->diverged = 0;
  for (int i = 0; i < warps; i++) {
    if (c->warps[i].state != AT_BARRIER || c->warps[i].barrier != barrier) continue;
    waiting += LANES;
    join(all, c->warps[i].clock);
  }
  if (waiting < wanted) return;
  for (int i = 0; i < warps; i++) {
    Warp *other = &c->warps[i];
    if (other->state != AT_BARRIER || other->barrier != barrier) continue;
    join(other->clock, all);
    other->clock[i]++;
    other->state = RUNNING;
  }
}

static void shuffle(const Step *s, uint32_t lanes) { /* a: 0 from a lane by number, 1 from the one across */
  uint32_t known = known_lanes(s->warp, s->operand[1]);
  uint32_t *d = LANES_OF(uint32_t, 0), *number = LANES_OF(uint32_t, 2), *bounds = LANES_OF(uint32_t, 3), values[LANES];
  uint32_t members = LANES_OF(uint32_t, 4)[__builtin_ctz(s->mask)];
  memcpy(values, LANES_OF(uint32_t, 1), sizeof values);
  if ((members & lanes) != members || s->mask != lanes)
    found(s->cta, LANES_MISSING, s->at, s->warp->number, 0, members, 0);
  EACH_LANE {
    uint32_t segment = bounds[l] >> 8 & 31, most = bounds[l] & 31, b = number[l] & 31;
    uint32_t from = s->in->a ? l ^ b : (l & segment) | (b & ~segment);
    if (from > ((l & segment) | (most & ~segment))) from = l;
    if (!(s->mask >> from & 1)) found(s->cta, LANES_MISSING, s->at, s->warp->number, l, from, 0);
    d[l] = values[from];
    set_known(s->warp, s->operand[0], known >> from & 1 ? ALL_LANES : 0, 1u << l);
  }
}

static void elect(const Step *s) { /* results: the elected lane, whether it is this one */
  int lead = __builtin_ctz(s->mask);
  EACH_LANE LANES_OF(uint32_t, 0)[l] = lead;
  uint32_t *is_lead = LANES_OF(uint32_t, 1);
  *is_lead = (*is_lead & ~s->mask) | 1u << lead;
}

static void leave(const Step *s) {
  Warp *w = s->warp;
  if (s->mask == w->alive) {
    finish_copies(s->cta, w, 0);
    if (w->product_count) found(s->cta, MISUSED, s->at, w->number, 0, 0, 0);
  }
  w->alive &= ~s->mask;
  if (!w->alive) w->state = DONE;
}

/* lanes whose results are known, of an operation that passes on what nobody wrote */
static uint32_t known_result(const Step *s) {
  const Instruction *in = s->in;
  const Warp *w = s->warp;
  const int32_t *source = s->operand + in->results;
  if (in->operation == SELP) { /* only what it takes counts */
    uint32_t takes_first = *LANES_OF(uint32_t, 3);
    return known_lanes(w, source[2]) &
           ((takes_first & known_lanes(w, source[0])) | (~takes_first & known_lanes(w, source[1])));
  }
  uint32_t known = ALL_LANES;
  for (int i = 0; i < in->sources; i++) known &= known_lanes(w, source[i]);
  return known;
}

/* What nobody wrote may be moved and computed with, as code does that throws it away afterwards; so are the results then.
   It must not reach memory, an address, a product or a decision. */
static void check_registers(const Step *s) {
  const Instruction *in = s->in;
  Warp *w = s->warp;
  const int32_t *source = s->operand + in->results;
  int passes_on = in->operation <= LAST_ARITHMETIC;
  for (int i = 0; i < in->sources; i++) {
    uint32_t missing = s->mask & ~known_lanes(w, source[i]);
    if (!missing) continue;
    if (w->accumulating[source[i]]) found(s->cta, MISUSED, s->at, w->number, __builtin_ctz(missing), i, 0);
    else if (!passes_on && (in->operation != SHUFFLE || i > 0))
      found(s->cta, UNWRITTEN_REGISTER, s->at, w->number, __builtin_ctz(missing), i, 0);
  }
  uint32_t known = passes_on ? known_result(s) : ALL_LANES;
  /* the two parts of a register come from two, or go there */
  if (in->operation == PACK && in->sources == 2)
    for (int i = 0; i < 2; i++) {
      uint32_t *part = &w->defined[2 * s->operand[0] + i];
      *part = (*part & ~s->mask) | (known_lanes(w, source[i]) & s->mask);
    }
  else if (in->operation == UNPACK && in->results == 2)
    for (int i = 0; i < 2; i++) set_known(w, s->operand[i], w->defined[2 * source[0] + i], s->mask);
  /* products say themselves when their sums are there */
  else if (in->operation != WGMMA)
    for (int i = 0; i < in->results; i++) set_known(w, s->operand[i], known, s->mask);
}

/* 0 where the warp is blocked at it and will have to try again */
static int execute(const Step *s, uint32_t lanes) {
  switch (s->in->operation) {
  case NOTHING: return 1;
  case SHUFFLE: shuffle(s, lanes); return 1;
  case ELECT: elect(s); return 1;
  }
  return arithmetic(s) || memory(s) || product(s) || copy(s);
}

/* until it has to wait */
static void run_warp(Cta *c, Warp *w) {
  Launch *r = c->launch;
  while (w->state == RUNNING) {
    uint32_t lanes = next_lanes(w);
    const Instruction *in = &r->instructions[w->at];
    Step s = {.cta = c, .warp = w, .in = in, .operand = r->operands + in->operands, .mask = lanes, .at = w->at};
    if (++c->steps > r->limit) {
      found(c, ENDLESS, s.at, w->number, 0, 0, 0);
      w->state = DONE;
      return;
    }
    if (in->predicate >= 0) {
      uint32_t predicate = w->registers[(size_t)in->predicate * LANES];
      if (lanes & ~known_lanes(w, in->predicate)) found(c, UNWRITTEN_REGISTER, s.at, w->number, 0, 0, 0);
      s.mask &= in->negated ? ~predicate : predicate;
    }
    w->steps++;
    r->counts[s.at].executed++;
    if (in->operation == BRANCH) branch(w, lanes, s.mask, (uint32_t)in->offset);
    else if (!s.mask) go_on(w, lanes, s.at + 1);
    else if (in->operation == RETURN) leave(&s), go_on(w, lanes, s.at + 1);
    else {
      check_registers(&s);
      if (in->operation == BARRIER) arrive_at_barrier(&s);
      else if (execute(&s, lanes)) go_on(w, lanes, s.at + 1);
      else r->counts[s.at].executed--;
    }
  }
}

static void start_warp(Cta *c, int number) {
  Launch *r = c->launch;
  Warp *w = &c->warps[number], old = *w;
  *w = (Warp){.registers = old.registers, .defined = old.defined, .accumulating = old.accumulating, .copies = old.copies,
              .copy_room = old.copy_room, .products = old.products, .product_room = old.product_room,
              .alive = ALL_LANES, .number = number};
  w->clock[number] = 1;
  memcpy(w->registers, r->registers, (size_t)r->units * LANES * 4);
  memset(w->accumulating, 0, r->units);
  for (int u = 0; u < r->units; u++) set_known(w, u, r->defined[u] ? ALL_LANES : 0, ALL_LANES);
  int place[3] = {c->number % r->grid[0], c->number / r->grid[0] % r->grid[1], c->number / r->grid[0] / r->grid[1]};
  for (int l = 0; l < LANES; l++) {
    if (r->thread_unit >= 0) w->registers[(size_t)r->thread_unit * LANES + l] = LANES * number + l;
    for (int i = 0; i < 3; i++) if (r->cta_unit[i] >= 0) w->registers[(size_t)r->cta_unit[i] * LANES + l] = place[i];
  }
}

static void run_cta(Cta *c) {
  Launch *r = c->launch;
  c->mbarrier_count = c->bulk_count = c->async_clock = 0;
  memset(c->shared, 0xFF, r->shared_bytes);
  memset(c->shadow, 0, sizeof(Shadow) * (r->shared_bytes / GRANULE + 1));
  for (int i = 0; i < r->warps; i++) start_warp(c, i);
  for (;;) {
    int ran = 0, left = 0;
    for (int i = 0; i < r->warps; i++) {
      Warp *w = &c->warps[i];
      if (w->state == BLOCKED && mbarrier_is_past(c, w)) w->state = RUNNING;
      if (w->state == RUNNING) run_warp(c, w), ran = 1;
      left |= w->state != DONE;
    }
    if (!left) break;
    if (ran || deliver_one(c)) continue;
    for (int i = 0; i < r->warps; i++)
      if (c->warps[i].state != DONE) found(c, DEADLOCK, c->warps[i].at, i, 0, c->warps[i].waits_for, 0);
    break;
  }
  finish_bulk(c);
}

/* every CTA of the grid; the registers of each warp lie where a vector instruction may load them */
void run(Launch *r) {
  size_t granules = r->shared_bytes / GRANULE + 1, register_bytes = (size_t)r->units * LANES * 4;
  Cta c = {.launch = r, .shared = malloc(r->shared_bytes), .shadow = malloc(sizeof(Shadow) * granules),
           .read_at = calloc(granules * MOST_WARPS, 4), .warps = calloc(r->warps, sizeof(Warp))};
  for (int i = 0; i < r->warps; i++) {
    c.warps[i].registers = aligned_alloc(128, register_bytes);
    c.warps[i].defined = malloc((size_t)r->units * 8);
    c.warps[i].accumulating = malloc(r->units);
  }
  for (c.number = 0; c.number < r->grid[0] * r->grid[1] * r->grid[2] && r->finding_count < MOST_FINDINGS; c.number++)
    run_cta(&c);
  for (int i = 0; i < r->warps; i++) {
    free(c.warps[i].registers), free(c.warps[i].defined), free(c.warps[i].accumulating);
    free(c.warps[i].copies), free(c.warps[i].products);
  }
  free(c.shared), free(c.shadow), free(c.read_at), free(c.warps), free(c.bulk);
}

/* the tables of executor.h, for engine.py */
static const char *const operations[] = {
#define X(name) #name,
    OPERATIONS(X)
#undef X
    NULL};
static const char *const types[] = {
#define X(name) #name,
    TYPES(X)
#undef X
    NULL};
static const char *const findings[] = {
#define X(name, words) words,
    FINDINGS(X)
#undef X
    NULL};
const char *operation_name(int index) { return operations[index]; }
const char *type_name(int index) { return types[index]; }
const char *finding_name(int index) { return findings[index]; }
