/* Asynchronous copies: cp.async, and TMA with its mbarriers. Each arrives as late as it may. */

#include "executor.h"

/* ---- cp.async: a bytes each. Operands: shared address, global address, and how many bytes to read (others are 0) ---- */

static void start_copy(const Step *s) {
  const Instruction *in = s->in;
  Warp *w = s->warp;
  Counts *counts = &s->cta->launch->counts[s->at];
  uint32_t *to = LANES_OF(uint32_t, 0), *wanted = in->sources > 2 ? LANES_OF(uint32_t, 2) : NULL;
  uint64_t *from = LANES_OF(uint64_t, 1), source[LANES];
  uint32_t shared[LANES], reading = 0, at;
  EACH_LANE {
    shared[l] = to[l] + (uint32_t)in->offset;
    source[l] = from[l] + in->source_offset;
    uint32_t bytes = wanted ? wanted[l] : (uint32_t)in->a;
    if (!shared_is_open(s->cta, shared[l], in->a, in->a, s->at, w->number, l, &at)) continue;
    if (bytes > (uint32_t)in->a) {
      found(s->cta, MISUSED, s->at, w->number, l, source[l], bytes);
      bytes = in->a;
    }
    if (w->copy_count == w->copy_room) {
      w->copy_room = 2 * w->copy_room + 1024;
      w->copies = realloc(w->copies, sizeof(Copy) * w->copy_room);
    }
    Copy *copy = &w->copies[w->copy_count++];
    *copy = (Copy){.to = at, .bytes = in->a, .group = w->copy_group, .instruction = s->at, .lane = l};
    if (bytes) {
      reading |= 1u << l;
      if (global_is_open(s->cta, source[l], bytes, in->a, 0, s->at, w->number, l))
        memcpy(copy->data, (void *)source[l], bytes);
      else memset(copy->data, 0xFF, sizeof copy->data);
    }
    write_shared(s->cta, w->clock, w->number, at, in->a, s->at, l, STARTS, NULL);
    memset(s->cta->shared + at, 0xFF, in->a);
  }
  count_sectors(counts, source, reading, in->a);
  count_waves(counts, shared, s->mask, in->a);
}

void finish_copies(Cta *c, Warp *w, int groups_left) {
  int kept = 0;
  for (int i = 0; i < w->copy_count; i++) {
    Copy copy = w->copies[i];
    if (copy.group >= w->copy_group - groups_left) {
      w->copies[kept++] = copy;
      continue;
    }
    write_shared(c, w->clock, w->number, copy.to, copy.bytes, copy.instruction, copy.lane, ARRIVES, NULL);
    memcpy(c->shared + copy.to, copy.data, copy.bytes);
  }
  w->copy_count = kept;
}

/* ---- mbarriers ---- */

static Mbarrier *mbarrier_at(Cta *c, uint32_t address) {
  for (int i = 0; i < c->mbarrier_count; i++) if (c->mbarriers[i].address == address) return &c->mbarriers[i];
  return NULL;
}

/* the phase ends once everybody and every byte is there */
static void settle(Mbarrier *b) {
  if (!b->valid || b->missing || b->missing_bytes) return;
  b->phase++;
  b->missing = b->expected;
}

int mbarrier_is_past(Cta *c, const Warp *w) {
  Mbarrier *b = mbarrier_at(c, w->waits_for);
  return b && (uint32_t)(b->phase & 1) != w->parity;
}

#define OF_LEAD(T, index) LANES_OF(T, index)[lead]

static void make_mbarrier(const Step *s, uint32_t address, int expected) {
  uint32_t at;
  Cta *c = s->cta;
  if (!shared_is_open(c, address, 8, 8, s->at, s->warp->number, 0, &at)) return;
  Mbarrier *b = mbarrier_at(c, address);
  if (!b && c->mbarrier_count == MOST_BARRIERS) return found(c, MISUSED, s->at, s->warp->number, 0, address, 0);
  if (!b) b = &c->mbarriers[c->mbarrier_count++];
  *b = (Mbarrier){.address = address, .valid = 1, .expected = expected, .missing = expected};
}

static void arrive(const Step *s, Mbarrier *b) { /* every lane, with the bytes that it expects */
  EACH_LANE {
    b->missing_bytes += LANES_OF(uint32_t, 1)[l];
    if (b->missing == 0) found(s->cta, MISUSED, s->at, s->warp->number, l, b->address, 0);
    b->missing--;
  }
  join(b->clock, s->warp->clock);
  s->warp->clock[s->warp->number]++;
  settle(b);
}

static int mbarrier_operation(const Step *s, int lead) {
  const Instruction *in = s->in;
  Warp *w = s->warp;
  int waits = in->operation == MBWAIT;
  uint32_t address = OF_LEAD(uint32_t, in->results) + (uint32_t)in->offset;
  if (in->operation == MBINIT) return make_mbarrier(s, address, OF_LEAD(uint32_t, 1)), 1;
  Mbarrier *b = mbarrier_at(s->cta, address);
  if (!b || !b->valid) {
    found(s->cta, MISUSED, s->at, w->number, lead, address, 0);
    if (waits) *LANES_OF(uint32_t, 0) |= s->mask;
    return 1;
  }
  if (in->operation == MBINVAL) b->valid = 0;
  if (in->operation == MBEXPECT) arrive(s, b);
  if (!waits) return 1;
  w->waits_for = address, w->parity = OF_LEAD(uint32_t, 2) & 1;
  if (!mbarrier_is_past(s->cta, w)) return w->state = BLOCKED, 0;
  join(w->clock, b->clock);
  *LANES_OF(uint32_t, 0) |= s->mask;
  return 1;
}

/* ---- TMA ---- */

uint32_t swizzled(uint32_t address, int bytes) {
  /* pieces of 16 bytes change places within 32, 64 or 128 */
  return address ^ (bytes ? (address >> 7 & (bytes / 16 - 1)) << 4 : 0);
}

int is_unfenced(Cta *c, const Shadow *w, const Warp *reader) {
  /* what TMA wrote; and what cp.async did, which no Triton before 3.8 fences from wgmma, and GPUs have run it for long */
  if (!w->step) return 0;
  /* fenced by the writer, or by the reader after the two have met */
  return w->step > c->warps[w->writer].fenced_step && w->written > reader->fenced_clock[w->writer];
}

/* one row of a box on its way through shared memory, in the pieces that swizzling moves */
static void row_of_box(Cta *c, const Bulk *bulk, uint32_t address, int bytes, uint8_t *row, int when) {
  const Warp *w = &c->warps[bulk->warp];
  for (int i = 0; i < bytes; i += 16) {
    uint32_t piece = swizzled(address + i, bulk->map->swizzle), at;
    if (!shared_is_open(c, piece, 16, 16, bulk->instruction, bulk->warp, 0, &at)) continue;
    if (bulk->is_load) {
      write_shared(c, bulk->clock, ASYNC, at, 16, bulk->instruction, 0, when, NULL);
      if (when == ARRIVES) memcpy(c->shared + at, row + i, 16);
      else memset(c->shared + at, 0xFF, 16);
      continue;
    }
    if (is_unfenced(c, &c->shadow[at / GRANULE], w)) found(c, UNFENCED, bulk->instruction, bulk->warp, 0, piece, 16);
    read_shared(c, bulk->clock, bulk->warp, at, 16, bulk->instruction, 0);
    memcpy(row + i, c->shared + at, 16);
  }
}

/* what lies outside of the tensor reads 0 and is not written */
static void move_box(Cta *c, const Bulk *bulk, int when) {
  const TensorMap *map = bulk->map;
  Counts *counts = &c->launch->counts[bulk->instruction];
  int bytes = map->box[1] * map->element_bytes;
  int64_t first = bulk->column < 0 ? -bulk->column : 0, end = map->shape[1] - bulk->column;
  if (end > map->box[1]) end = map->box[1];
  uint8_t row[1024];
  for (int y = 0; y < map->box[0]; y++) {
    int64_t at_row = (int64_t)bulk->row + y;
    int is_inside = at_row >= 0 && at_row < map->shape[0] && end > first;
    uint64_t from = first * map->element_bytes, length = (end - first) * map->element_bytes;
    uint64_t global = map->start + (at_row * map->stride + bulk->column + first) * map->element_bytes;
    if (bulk->is_load && when == ARRIVES) {
      memset(row, 0, bytes);
      if (is_inside && global_is_open(c, global, length, map->element_bytes, 0, bulk->instruction, bulk->warp, 0))
        memcpy(row + from, (void *)global, length);
    }
    row_of_box(c, bulk, bulk->shared + y * bytes, bytes, row, when);
    if (!is_inside || when != ARRIVES) continue;
    if (!bulk->is_load && global_is_open(c, global, length, map->element_bytes, 1, bulk->instruction, bulk->warp, 0))
      memcpy((void *)global, row + from, length);
    counts->sectors += (global + length - 1) / 32 - global / 32 + 1, counts->least_sectors += (length + 31) / 32;
  }
}

static void finish(Cta *c, int index) {
  Bulk bulk = c->bulk[index];
  c->bulk_count--;
  memmove(&c->bulk[index], &c->bulk[index + 1], sizeof(Bulk) * (c->bulk_count - index));
  if (bulk.is_load) bulk.clock[ASYNC] = ++c->async_clock;
  move_box(c, &bulk, ARRIVES);
  if (!bulk.is_load) return;
  Mbarrier *b = mbarrier_at(c, bulk.mbarrier);
  if (!b || !b->valid) return found(c, MISUSED, bulk.instruction, bulk.warp, 0, bulk.mbarrier, 0);
  join(b->clock, bulk.clock);
  b->missing_bytes -= (int64_t)bulk.map->box[0] * bulk.map->box[1] * bulk.map->element_bytes;
  settle(b);
}

/* the oldest load arrives, when everybody waits */
int deliver_one(Cta *c) {
  for (int i = 0; i < c->bulk_count; i++) if (c->bulk[i].is_load) return finish(c, i), 1;
  return 0;
}

/* shared memory goes with the CTA: what is still on its way then is an error */
void finish_bulk(Cta *c) {
  while (c->bulk_count) {
    found(c, MISUSED, c->bulk[0].instruction, c->bulk[0].warp, 0, c->bulk[0].shared, 0);
    finish(c, 0);
  }
}

/* operands: shared address, map, column, row, and of a load its mbarrier */
static void start_bulk(const Step *s, int lead) {
  Cta *c = s->cta;
  Warp *w = s->warp;
  uint64_t address = OF_LEAD(uint64_t, 1), index = (address - MAPS) / MAP_BYTES;
  if (s->mask & (s->mask - 1)) found(c, MISUSED, s->at, w->number, lead, s->mask, 0);
  if (address < MAPS || index >= (uint64_t)c->launch->map_count)
    return found(c, MISUSED, s->at, w->number, lead, address, 0);
  if (c->bulk_count == c->bulk_room) {
    c->bulk_room = 2 * c->bulk_room + 64;
    c->bulk = realloc(c->bulk, sizeof(Bulk) * c->bulk_room);
  }
  Bulk *bulk = &c->bulk[c->bulk_count++];
  *bulk = (Bulk){.is_load = s->in->operation == TMALOAD, .warp = w->number, .instruction = s->at, .group = w->store_group,
                 .shared = OF_LEAD(uint32_t, 0), .map = &c->launch->maps[index], .column = OF_LEAD(int32_t, 2),
                 .row = OF_LEAD(int32_t, 3)};
  memcpy(bulk->clock, w->clock, sizeof bulk->clock);
  if (bulk->map->swizzle && bulk->shared % 128) found(c, MISALIGNED, s->at, w->number, lead, bulk->shared, 128);
  bulk->clock[ASYNC] = c->async_clock;
  if (!bulk->is_load) return;
  bulk->mbarrier = OF_LEAD(uint32_t, 4);
  bulk->clock[ASYNC] = ++c->async_clock;
  move_box(c, bulk, STARTS);
}

static void wait_for_stores(const Step *s) {
  Cta *c = s->cta;
  for (int i = 0; i < c->bulk_count;) {
    const Bulk *bulk = &c->bulk[i];
    int is_due = !bulk->is_load && bulk->warp == s->warp->number && bulk->group < s->warp->store_group - (int)s->in->offset;
    if (is_due) finish(c, i);
    else i++;
  }
}

int copy(const Step *s) {
  Warp *w = s->warp;
  int lead = __builtin_ctz(s->mask);
  switch (s->in->operation) {
  case CPASYNC: start_copy(s); return 1;
  case CPCOMMIT: w->copy_group++; return 1;
  case CPWAIT: finish_copies(s->cta, w, (int)s->in->offset); return 1;
  case TMALOAD: case TMASTORE: start_bulk(s, lead); return 1;
  case TMACOMMIT: w->store_group++; return 1;
  case TMAWAIT: wait_for_stores(s); return 1;
  case FENCE:
    w->fenced_step = w->steps;
    memcpy(w->fenced_clock, w->clock, sizeof w->clock);
    /* of this warp what came before, not what its clock will still count */
    w->fenced_clock[w->number]--;
    return 1;
  default: return mbarrier_operation(s, lead);
  }
}
