// Runs CUDA kernels on the host: what device.h declares. x86-64.
//
// Every CUDA thread is a fiber, and those of a cluster's CTAs run by turns, in an order that depends on a seed; clusters run one after the
// other. It is built to find mistakes that a GPU may hide:
//
// - Shared memory is filled with 0xFF bytes (NaN as floats) and ends at a page that may not be touched.
// - Copies and asynchronous stores land whenever the seed says: at once, when nobody can go on without them, or in between.
// - wgmma reads its registers and shared memory when somebody waits for it, and not before; a tensor store reads shared memory then.
// - Lanes that disagree about the next warp-wide operation, barriers that are used before they are initialised or by too many threads,
//   what is in flight when its CTA ends, and threads that wait for each other all end the run with a message.
//
// Sums of products are in double: the order in which tensor cores add is not specified.
//
// It is long on purpose: memory, barriers, copies and products all say to one scheduler what a thread waits for, and all end a run alike.
#include "device.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

Index3 threadIdx, blockIdx, blockDim, gridDim;

// Saves what a function must leave as it was and goes on with another stack.
extern "C" void host_switch(void** save, void* to);
asm(R"(
.text
.p2align 4
.globl host_switch
.hidden host_switch
.type host_switch, @function
host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size host_switch, .-host_switch
)");

namespace host {
namespace {

constexpr int kWarp = 32, kWords = 12, kNamedBarriers = 16;
constexpr rlim_t kMostSeconds = 120;  // of a run, which may wait for memory that nobody writes
constexpr size_t kStack = 256 << 10, kPage = 4096;
constexpr u32 kRankShift = 24;  // of the address of shared memory of a CTA of the cluster: the rank, plus one, is above the offset
constexpr unsigned char kSlack = 0xA5;  // what is before and behind shared memory, in its pages
constexpr u64 kMagic = 0x726569727261626dull;  // where an mbarrier is

struct Round {
  const char* what = "";
  int arrived = 0;
  u32 in[kWarp][kWords], out[kWarp][4];
};

struct Warp {
  Round rounds[2];
  u64 complete = 0;
};

struct MBarrier {
  u32 expected = 0, pending = 0;
  long long bytes = 0;
  u32 phase = 0;
};

struct NamedBarrier {
  int expected = 0, arrived = 0;
  u64 generation = 0;
};

struct Copy {
  u32 to;
  const void* from;
  int valid;
};

struct Store {
  Matrix map;
  int x, y;
  u32 from;
};

struct Wgmma {
  Type type;
  int columns;
  void* d;
  const u32* a;
  u64 a_descriptor, b_descriptor;
  int add;
};

// Groups of something that runs on while its thread does.
template <typename Each>
struct Groups {
  std::vector<Each> open;
  std::vector<std::vector<Each>> closed;

  void commit() {
    closed.push_back(std::move(open));
    open.clear();
  }
  bool idle() const {
    return open.empty() && std::all_of(closed.begin(), closed.end(), [](const auto& group) { return group.empty(); });
  }
  template <typename Do>
  void complete(size_t pending, Do run) {
    while (closed.size() > pending) {
      for (const Each& each : closed.front()) run(each);
      closed.erase(closed.begin());
    }
  }
};

struct Cta;

enum class Wait { kNone, kMeet, kBarrier, kMBarrier, kCluster };

struct Fiber {
  void* stack = nullptr;
  const u64* stack_end = nullptr;  // which stays zero, or the stack is too small
  Cta* cta = nullptr;
  int thread = 0;
  bool done = false, asleep = false;
  Wait wait = Wait::kNone;
  u64 target = 0;  // what is waited for: a round, a generation or a parity
  union {
    const Warp* warp;
    const NamedBarrier* barrier;
    const MBarrier* mbarrier;
  } of{};
  u32 where = 0;  // the barrier's number or address
  const char* what = "";
  u64 meets = 0, cluster_arrivals = 0;
  Groups<Copy> copies;
  Groups<Store> stores;
  Groups<Wgmma> wgmmas;
};

struct Cta {
  int rank = 0, alive = 0;
  Index3 index{};
  unsigned char *pages = nullptr, *shared = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  NamedBarrier barriers[kNamedBarriers];
  std::unordered_map<u32, MBarrier> mbarriers;
};

// Bytes on their way to shared memory.
struct Flight {
  enum { kBulk, kBox, kWords } kind;
  Cta* cta;
  u32 to, bytes;
  MBarrier* barrier;
  const void* from;
  Matrix map;
  int x, y;
  unsigned char words[16];
};

enum Landing { kSometime, kAtOnce, kLate };

void* scheduler;
Fiber* current;
std::vector<Cta> ctas;  // of the cluster
std::vector<Flight> flights;
u64 cluster_phase, cluster_arrived, elected, state, lull_left;  // of the present lull, passes over all threads
size_t shared_bytes, shared_size;  // as asked for, and in multiples of 16
Landing landing;
bool progress;
const char* kernel = "";
void (*entry)(const long long*);
const long long* arguments;

u64 random_below(u64 limit) {
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return (state >> 11) % limit;
}

template <typename Each>
void shuffle(std::vector<Each>& values) {
  for (size_t i = values.size(); i > 1; --i) std::swap(values[i - 1], values[random_below(i)]);
}

[[noreturn]] void stop() {
  std::fflush(stderr);
  _exit(1);
}

[[noreturn]] __attribute__((format(printf, 1, 2))) void failf(const char* format, ...) {
  char reason[512];
  va_list values;
  va_start(values, format);
  std::vsnprintf(reason, sizeof reason, format, values);
  va_end(values);
  fail(reason);
}

void out_of_bounds(int, siginfo_t* info, void*) {
  std::fprintf(stderr, "%s: CTA %u, thread %u touches %p, where no argument and no shared memory is\n", kernel, blockIdx.x, threadIdx.x,
               info->si_addr);
  stop();
}

bool ready(const Fiber& fiber) {
  switch (fiber.wait) {
    case Wait::kNone: return true;
    case Wait::kMeet: return fiber.of.warp->complete > fiber.target;
    case Wait::kBarrier: return fiber.of.barrier->generation > fiber.target;
    case Wait::kMBarrier: return (fiber.of.mbarrier->phase & 1) != fiber.target;
    case Wait::kCluster: return cluster_phase > fiber.target;
  }
  return false;
}

// From now on some warps, or some lanes of all of them, run only if no other can: nobody may count on another's being quick.
void lull() {
  const u64 kind = random_below(3);
  lull_left = u64{1} << random_below(8);
  for (Cta& cta : ctas)
    for (size_t first = 0; first < cta.fibers.size(); first += kWarp) {
      // Who sleeps may go on to.
      const bool warp_sleeps = kind == 1 && random_below(8) < (cta.fibers[first].asleep ? 6 : 2);
      for (size_t lane = 0; lane < kWarp; ++lane) cta.fibers[first + lane].asleep = warp_sleeps || (kind == 2 && random_below(8) == 0);
    }
}

// When many can go on who waited, it matters most who does.
void may_lull() {
  if (random_below(8) == 0) lull();
}

void leave() { host_switch(&current->stack, scheduler); }

// Where a thread has told others something, they may go on first, and far.
void pause() {
  if (random_below(4)) return;
  current->wait = Wait::kNone;
  current->asleep = random_below(4) == 0;
  leave();
}

void wait(Wait kind, u64 target, const char* what, u32 where = 0) {
  Fiber& fiber = *current;
  fiber.wait = kind, fiber.target = target, fiber.what = what, fiber.where = where;
  // Who need not wait may do so all the same: others come first.
  if (!ready(fiber) || random_below(2)) leave();
  fiber.wait = Wait::kNone;
}

// Leave words for the other lanes and wait until every lane has; the last to come calls `finish`, which fills in what all get.
template <typename Finish>
const u32* meet(const char* what, std::initializer_list<u32> words, Finish finish) {
  Fiber& fiber = *current;
  Warp& warp = fiber.cta->warps[fiber.thread / kWarp];
  const u64 mine = fiber.meets++;
  Round& round = warp.rounds[mine % 2];
  const int lane = fiber.thread % kWarp;
  if (round.arrived == 0) round.what = what;
  if (std::strcmp(round.what, what) != 0) failf("the lanes of its warp are in different operations: %s, and here %s", round.what, what);
  std::copy(words.begin(), words.end(), round.in[lane]);
  progress = true;
  if (++round.arrived == kWarp) {
    finish(round);
    warp.rounds[(mine + 1) % 2].arrived = 0;
    ++warp.complete;
  } else {
    fiber.of.warp = &warp;
    wait(Wait::kMeet, mine, what);
  }
  return round.out[lane];
}

// ---- shared memory ----

unsigned char* at(Cta& cta, u32 offset, u32 bytes, u32 alignment, const char* what) {
  if (offset % alignment) failf("%s: address %#x of shared memory is no multiple of %u", what, offset, alignment);
  if (offset + static_cast<u64>(bytes) > shared_bytes)
    failf("%s: %u bytes at %#x of shared memory, which has %zu", what, bytes, offset, shared_bytes);
  return cta.shared + offset;
}

unsigned char* own(u32 address, u32 bytes, u32 alignment, const char* what) {
  return at(*current->cta, address, bytes, alignment, what);
}

// The CTA that an address from mapa is in; the address becomes its offset.
Cta& owner(u32& address, const char* what) {
  const u32 rank = address >> kRankShift;
  if (rank > ctas.size()) failf("%s: no CTA of the cluster has address %#x", what, address);
  address &= (1u << kRankShift) - 1;
  return rank == 0 ? *current->cta : ctas[rank - 1];
}

void must_be_there(const Cta& cta, const char* what) {
  if (cta.alive == 0) failf("%s: CTA %d of the cluster has ended", what, cta.rank);
}

MBarrier& mbarrier(Cta& cta, u32 address, const char* what) {
  const auto found = cta.mbarriers.find(address);
  if (found == cta.mbarriers.end()) failf("%s: there is no mbarrier at %#x of CTA %d yet", what, address, cta.rank);
  u64 magic;
  std::memcpy(&magic, cta.shared + address, 8);
  if (magic != kMagic) failf("%s: the mbarrier at %#x of CTA %d was overwritten", what, address, cta.rank);
  return found->second;
}

void advance(MBarrier& barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0) ++barrier.phase, barrier.pending = barrier.expected, may_lull();
  progress = true;
}

void arrive(Cta& cta, u32 address, const char* what, u32 bytes = 0) {
  MBarrier& barrier = mbarrier(cta, address, what);
  if (barrier.pending == 0)
    failf("%s: more arrivals at the mbarrier at %#x of CTA %d than the %u of a phase", what, address, cta.rank, barrier.expected);
  barrier.bytes += bytes, --barrier.pending;
  advance(barrier);
}

// The 128-byte swizzle, of an address.
u32 swizzled(u32 address) { return address ^ ((address >> 7 & 7) << 4); }

// ---- copies ----

void land(const Flight& flight) {
  unsigned char* const base = flight.cta->shared;
  if (flight.kind == Flight::kBulk) {
    std::memcpy(base + flight.to, flight.from, flight.bytes);
  } else if (flight.kind == Flight::kWords) {
    std::memcpy(base + flight.to, flight.words, flight.bytes);
  } else {
    const Matrix& map = flight.map;
    for (long long row = 0; row < map.box_rows; ++row)
      for (long long byte = 0; byte < 128; byte += map.element) {
        const long long y = flight.y + row, x = flight.x + byte / map.element;
        unsigned char* const to = base + swizzled(flight.to + static_cast<u32>(row * 128 + byte));
        if (y >= 0 && y < map.rows && x >= 0 && x < map.columns)
          std::memcpy(to, map.address + y * map.pitch + x * map.element, map.element);
        else
          std::memset(to, 0, map.element);
      }
  }
  flight.barrier->bytes -= flight.bytes;
  advance(*flight.barrier);
}

void send(const Flight& flight) {
  if (landing == kAtOnce)
    land(flight);
  else
    flights.push_back(flight);
}

void land_one(size_t which) {
  const Flight flight = flights[which];
  flights[which] = flights.back();
  flights.pop_back();
  land(flight);
}

void run(const Copy& copy) {
  unsigned char* const to = current->cta->shared + copy.to;
  std::memcpy(to, copy.from, copy.valid);
  std::memset(to + copy.valid, 0, 16 - copy.valid);
}

void run(const Store& store) {
  const Matrix& map = store.map;
  for (long long row = 0; row < map.box_rows; ++row)
    for (long long byte = 0; byte < 128; byte += map.element) {
      const long long y = store.y + row, x = store.x + byte / map.element;
      if (y < map.rows && x < map.columns)
        std::memcpy(map.address + y * map.pitch + x * map.element,
                    current->cta->shared + swizzled(store.from + static_cast<u32>(row * 128 + byte)), map.element);
    }
}

Matrix matrix(const void* map, const char* what) {
  const Matrix found = *static_cast<const Matrix*>(map);
  if (found.magic != kMagic || found.box_columns * found.element != 128) failf("%s: no tensor map of boxes of 128 bytes", what);
  return found;
}

void copy_box(Cta& cta, u32 to, const void* map, int x, int y, u32 barrier, const char* what) {
  Flight flight{Flight::kBox, &cta, to, 0, nullptr, nullptr, matrix(map, what), x, y, {}};
  flight.bytes = static_cast<u32>(flight.map.box_rows * 128);
  must_be_there(cta, what);
  at(cta, to, flight.bytes, 128, what);
  flight.barrier = &mbarrier(cta, barrier, what);
  send(flight);
}

void store_words(u32 to, const float* values, u32 bytes, u32 barrier) {
  const char* const what = "st.async";
  if (to >> kRankShift != barrier >> kRankShift) failf("%s: the mbarrier is not in the CTA of the address", what);
  owner(barrier, what);
  Cta& cta = owner(to, what);
  must_be_there(cta, what);
  at(cta, to, bytes, bytes, what);
  Flight flight{Flight::kWords, &cta, to, bytes, &mbarrier(cta, barrier, what), nullptr, {}, 0, 0, {}};
  std::memcpy(flight.words, values, bytes);
  send(flight);
}

// ---- the scheduler ----

void end_of(Fiber& fiber) {
  if (*fiber.stack_end != 0) fail("needs more stack than there is");
  if (!fiber.copies.idle()) fail("ends before its cp.async copies have landed");
  if (!fiber.stores.idle()) fail("ends before its bulk stores have read shared memory");
  if (!fiber.wgmmas.idle()) fail("ends before its wgmmas are complete");
  fiber.done = progress = true;
  Cta& cta = *fiber.cta;
  if (--cta.alive) return;
  for (const Flight& flight : flights)
    if (flight.cta == &cta) fail("ends its CTA while something is on its way to its shared memory");
  for (const unsigned char* p = cta.pages; p < cta.shared; ++p)
    if (*p != kSlack) fail("shared memory is written before its first byte");
  for (size_t i = shared_bytes; i < shared_size; ++i)
    if (cta.shared[i] != kSlack) fail("shared memory is written beyond what the launcher asked for");
}

void start() {
  entry(arguments);
  end_of(*current);
  leave();
}

void check_cluster() {
  u64 gone = 0, threads = 0;
  for (const Cta& cta : ctas)
    for (const Fiber& fiber : cta.fibers) {
      gone += fiber.done && fiber.cluster_arrivals <= cluster_phase;
      ++threads;
    }
  if (cluster_arrived > 0 && cluster_arrived + gone == threads) cluster_arrived = 0, ++cluster_phase, progress = true;
}

[[noreturn]] void deadlock() {
  std::map<std::string, int> waiting;
  for (const Cta& cta : ctas)
    for (const Fiber& fiber : cta.fibers) {
      if (fiber.done) continue;
      char line[200], more[100] = "";
      if (fiber.wait == Wait::kMBarrier)
        std::snprintf(more, sizeof more, " at %#x, phase %u, short of %u arrivals and %lld bytes", fiber.where, fiber.of.mbarrier->phase,
                      fiber.of.mbarrier->pending, fiber.of.mbarrier->bytes);
      else if (fiber.wait == Wait::kBarrier)
        std::snprintf(more, sizeof more, " %u, where %d of %d threads are", fiber.where, fiber.of.barrier->arrived,
                      fiber.of.barrier->expected);
      std::snprintf(line, sizeof line, "  CTA %u, warp %2d: %s%s", cta.index.x, fiber.thread / kWarp, fiber.what, more);
      ++waiting[line];
    }
  std::fprintf(stderr, "%s: no thread can go on, and nothing is on its way. Who waits for what:\n", kernel);
  for (const auto& [line, count] : waiting) std::fprintf(stderr, "%s (%d threads)\n", line.c_str(), count);
  stop();
}

bool run_warp(Cta& cta, int warp) {
  bool any = false;
  const int first = static_cast<int>(random_below(kWarp)), step = random_below(2) ? 1 : kWarp - 1;
  for (int i = 0; i < kWarp; ++i) {
    Fiber& fiber = cta.fibers[warp * kWarp + (first + i * step) % kWarp];
    if (fiber.done || fiber.asleep || !ready(fiber)) continue;
    any = true;
    current = &fiber;
    threadIdx.x = static_cast<unsigned>(fiber.thread), blockIdx = cta.index;
    host_switch(&scheduler, fiber.stack);
  }
  return any;
}

// Wake one that could run, if there is any.
bool wake() {
  std::vector<Fiber*> able;
  for (Cta& cta : ctas)
    for (Fiber& fiber : cta.fibers)
      if (fiber.asleep && !fiber.done && ready(fiber)) able.push_back(&fiber);
  if (able.empty()) return false;
  Fiber& chosen = *able[random_below(able.size())];
  for (int lane = 0; lane < kWarp; ++lane) chosen.cta->fibers[chosen.thread / kWarp * kWarp + lane].asleep = false;
  return true;
}

void run_cluster(const std::vector<Index3>& indices, int threads, char* stacks) {
  for (size_t rank = 0; rank < indices.size(); ++rank) {
    Cta& cta = ctas[rank];
    cta.rank = static_cast<int>(rank), cta.alive = threads, cta.index = indices[rank];
    cta.fibers.clear();
    cta.fibers.resize(threads);
    cta.warps.assign(threads / kWarp, Warp());
    cta.mbarriers.clear();
    std::fill(cta.barriers, cta.barriers + kNamedBarriers, NamedBarrier());
    std::memset(cta.pages, kSlack, cta.shared - cta.pages);
    std::memset(cta.shared, 0xFF, shared_bytes);
    std::memset(cta.shared + shared_bytes, kSlack, shared_size - shared_bytes);
    for (int thread = 0; thread < threads; ++thread) {
      Fiber& fiber = cta.fibers[thread];
      fiber.cta = &cta, fiber.thread = thread;
      char* const stack = stacks + (rank * threads + thread) * kStack;
      fiber.stack_end = reinterpret_cast<const u64*>(stack);
      void** top = reinterpret_cast<void**>(stack + kStack);
      *--top = nullptr;                           // where a return address would be: calls align stacks so
      *--top = reinterpret_cast<void*>(&start);  // where host_switch returns to
      for (int i = 0; i < 6; ++i) *--top = nullptr;
      fiber.stack = top;
    }
  }
  flights.clear();
  cluster_phase = cluster_arrived = 0;
  std::vector<std::pair<Cta*, int>> order;
  for (Cta& cta : ctas)
    for (int warp = 0; warp < threads / kWarp; ++warp) order.push_back({&cta, warp});
  const auto alive = [] { return std::any_of(ctas.begin(), ctas.end(), [](const Cta& cta) { return cta.alive > 0; }); };
  for (lull_left = 0; alive(); --lull_left) {
    progress = false;
    if (lull_left == 0) lull();
    shuffle(order);
    for (const auto& [cta, warp] : order)
      // Some warps run ahead of others.
      for (u64 turns = 1 + random_below(4); turns > 0 && run_warp(*cta, warp); --turns) progress = true;
    check_cluster();
    if (landing == kSometime)
      for (size_t i = flights.size(); i-- > 0;)
        if (random_below(4) == 0) land_one(i);
    if (progress || !alive()) continue;
    const bool landed = !flights.empty() && random_below(2);
    if (!landed && wake()) continue;
    if (flights.empty()) deadlock();
    land_one(random_below(flights.size()));
  }
}

}  // namespace

void fail(const char* reason) {
  std::fprintf(stderr, "%s: CTA %u, thread %u: %s\n", kernel, blockIdx.x, threadIdx.x, reason);
  stop();
}

// Run a grid; returns when it has ended.
extern "C" void host_run(void (*function)(const long long*), const char* name, int grid_x, int grid_y, int grid_z, int threads, int cluster,
                         long long bytes, long long seed, const long long* values) {
  entry = function, kernel = name, arguments = values;
  state = 0x9E3779B97F4A7C15ull * static_cast<u64>(seed + 1);
  landing = static_cast<Landing>(seed % 3);
  elected = random_below(kWarp);
  gridDim = {static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y), static_cast<unsigned>(grid_z)};
  blockDim = {static_cast<unsigned>(threads), 1, 1};
  if (threads % kWarp || grid_x % cluster) fail("threads make no whole warps, or CTAs no whole clusters");
  const rlimit limit{kMostSeconds, kMostSeconds};
  setrlimit(RLIMIT_CPU, &limit);
  static char handler_stack[64 << 10];
  const stack_t handlers{handler_stack, 0, sizeof handler_stack};
  sigaltstack(&handlers, nullptr);
  struct sigaction action {};
  action.sa_sigaction = out_of_bounds;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (const int number : {SIGSEGV, SIGBUS}) sigaction(number, &action, nullptr);

  shared_bytes = static_cast<size_t>(bytes);
  shared_size = (shared_bytes + 15) / 16 * 16;
  const size_t pages = (shared_size + kPage - 1) / kPage * kPage;
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  ctas = std::vector<Cta>(cluster);
  for (Cta& cta : ctas) {
    cta.pages = static_cast<unsigned char*>(mmap(nullptr, pages + kPage, PROT_READ | PROT_WRITE, kFlags, -1, 0));
    mprotect(cta.pages + pages, kPage, PROT_NONE);
    cta.shared = cta.pages + pages - shared_size;
  }
  const size_t stacks_size = kStack * threads * cluster;
  char* const stacks = static_cast<char*>(mmap(nullptr, stacks_size, PROT_READ | PROT_WRITE, kFlags, -1, 0));
  if (stacks == MAP_FAILED) fail("no memory for stacks");

  std::vector<Index3> clusters;
  for (int z = 0; z < grid_z; ++z)
    for (int y = 0; y < grid_y; ++y)
      for (int x = 0; x < grid_x; x += cluster)
        clusters.push_back({static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)});
  shuffle(clusters);
  for (const Index3& first : clusters) {
    std::vector<Index3> indices(cluster, first);
    for (int rank = 0; rank < cluster; ++rank) indices[rank].x += static_cast<unsigned>(rank);
    run_cluster(indices, threads, stacks);
  }
  for (const Cta& cta : ctas) munmap(cta.pages, pages + kPage);
  munmap(stacks, stacks_size);
}

unsigned char* shared_memory() { return current->cta->shared; }
u32 shared_address(const void* pointer) { return static_cast<u32>(static_cast<const unsigned char*>(pointer) - current->cta->shared); }

// ---- numbers ----

namespace {

template <typename To, typename From>
To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// a + b as a double whose last bit says whether anything was lost, so that rounding it to less than 52 bits rounds the sum once.
double odd_sum(double a, double b) {
  const double sum = a + b;
  if (!std::isfinite(sum)) return sum;
  const double part = sum - a, lost = (a - (sum - part)) + (b - part);
  if (lost == 0 || (bits_of<u64>(sum) & 1)) return sum;
  return std::nextafter(sum, lost > 0 ? HUGE_VAL : -HUGE_VAL);
}

// To so many bits of mantissa, the hidden one included, and no finer than 2^least; to nearest even.
double rounded(double value, int mantissa, int least) {
  if (value == 0 || !std::isfinite(value)) return value;
  const int unit = std::max(std::ilogb(value) - mantissa + 1, least);
  return std::ldexp(std::nearbyint(std::ldexp(value, -unit)), unit);
}

double pair_value(Type type, u32 word, int i) {
  const u16 bits = static_cast<u16>(word >> (16 * i));
  return type == Type::kBf16 ? bf16_to_double(bits) : half_to_double(bits);
}

template <typename Operation>
u32 of_pairs(Type type, Operation operation) {
  u32 result = 0;
  for (int i = 0; i < 2; ++i) {
    double rest = 0;
    const double value = operation(i, rest);
    result |= u32{type == Type::kBf16 ? double_to_bf16(value, rest) : double_to_half(value, rest)} << (16 * i);
  }
  return result;
}

u32 add_pairs(Type type, u32 a, u32 b) {
  return of_pairs(type, [&](int i, double& rest) { return rest = pair_value(type, b, i), pair_value(type, a, i); });
}
u32 multiply_pairs(Type type, u32 a, u32 b) {
  return of_pairs(type, [&](int i, double&) { return pair_value(type, a, i) * pair_value(type, b, i); });
}
u32 multiply_add_pairs(Type type, u32 a, u32 b, u32 c) {
  return of_pairs(type, [&](int i, double& rest) {
    return rest = pair_value(type, c, i), pair_value(type, a, i) * pair_value(type, b, i);
  });
}

double e4m3_to_double(u32 bits) {
  const int exponent = static_cast<int>(bits >> 3 & 15), mantissa = static_cast<int>(bits & 7);
  if ((bits & 0x7f) == 0x7f) return NAN;
  const double value = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  return bits & 0x80 ? -value : value;
}

u32 to_e4m3(float value) {
  if (std::isnan(value)) return 0x7f;
  const double magnitude = std::min(rounded(std::fabs(static_cast<double>(value)), 4, -9), 448.0);
  u32 bits = std::signbit(value) ? 0x80 : 0;
  if (magnitude < 0x1p-6) return bits | static_cast<u32>(magnitude * 512);
  const int exponent = std::ilogb(magnitude);
  return bits | static_cast<u32>(exponent + 7) << 3 | (static_cast<u32>(std::ldexp(magnitude, 3 - exponent)) & 7);
}

}  // namespace

float half_to_float(u16 bits) { return static_cast<float>(bits_of<_Float16>(bits)); }
u16 float_to_half(float value) { return bits_of<u16>(static_cast<_Float16>(value)); }
double half_to_double(u16 bits) { return half_to_float(bits); }
u16 double_to_half(double value, double rest) { return bits_of<u16>(static_cast<_Float16>(odd_sum(value, rest))); }
double bf16_to_double(u16 bits) { return bits_of<float>(static_cast<u32>(bits) << 16); }
u16 double_to_bf16(double value, double rest) {
  const double sum = odd_sum(value, rest);
  return std::isnan(sum) ? 0x7fff : static_cast<u16>(bits_of<u32>(static_cast<float>(rounded(sum, 8, -133))) >> 16);
}
float add_toward_zero(float a, float b) {
  const double sum = odd_sum(a, b);
  const float nearest = static_cast<float>(sum);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(sum) ? std::nextafter(nearest, 0.0f) : nearest;
}
u32 to_tf32(float value) {
  if (std::isnan(value)) return 0x7fffffff;
  const u32 bits = bits_of<u32>(value);
  return std::isinf(value) ? bits : (bits + 0x1000) & ~0x1fffu;
}
u16 to_e4m3x2(float high, float low) { return static_cast<u16>(to_e4m3(high) << 8 | to_e4m3(low)); }

void add_f16x2(u32& d, u32 a, u32 b) { d = add_pairs(Type::kF16, a, b); }
void sub_f16x2(u32& d, u32 a, u32 b) { d = add_pairs(Type::kF16, a, b ^ 0x80008000u); }
void mul_f16x2(u32& d, u32 a, u32 b) { d = multiply_pairs(Type::kF16, a, b); }
void fma_f16x2(u32& d, u32 a, u32 b, u32 c) { d = multiply_add_pairs(Type::kF16, a, b, c); }
void add_bf16x2(u32& d, u32 a, u32 b) { d = add_pairs(Type::kBf16, a, b); }
void mul_bf16x2(u32& d, u32 a, u32 b) { d = multiply_pairs(Type::kBf16, a, b); }
void fma_bf16x2(u32& d, u32 a, u32 b, u32 c) { d = multiply_add_pairs(Type::kBf16, a, b, c); }

// ---- warps and barriers ----

namespace {

template <typename Combine>
u32 meet_all(const char* what, u32 value, Combine combine) {
  return *meet(what, {value}, [&](Round& round) {
    u32 all = round.in[0][0];
    for (int lane = 1; lane < kWarp; ++lane) all = combine(all, round.in[lane][0]);
    for (auto& out : round.out) out[0] = all;
  });
}

}  // namespace

u32 meet_any(u32 value) {
  return meet_all("vote.any", value != 0, [](u32 a, u32 b) { return a | b; });
}
u32 meet_or(u32 value) {
  return meet_all("redux.or", value, [](u32 a, u32 b) { return a | b; });
}
u32 meet_max(u32 value) {
  return meet_all("redux.max", value, [](u32 a, u32 b) { return std::max(a, b); });
}
u32 meet_from(u32 value, int lane) {
  return *meet("shfl", {value, static_cast<u32>(lane)}, [](Round& round) {
    for (int i = 0; i < kWarp; ++i) round.out[i][0] = round.in[round.in[i][1] % kWarp][0];
  });
}
void meet() {
  meet("bar.warp.sync", {}, [](Round&) {});
}
bool elect() {
  meet("elect.sync", {}, [](Round&) {});
  return static_cast<u64>(current->thread % kWarp) == elected;
}

// Count the thread as one that came to the barrier, and return it with the generation that it came to.
NamedBarrier& come_to(int id, int threads, const char* what, u64& mine) {
  Cta& cta = *current->cta;
  const int all = static_cast<int>(cta.fibers.size()), expected = threads ? threads : all;
  if (id < 0 || id >= kNamedBarriers || expected % kWarp || expected > all) failf("%s %d of %d threads", what, id, threads);
  NamedBarrier& barrier = cta.barriers[id];
  if (barrier.arrived == 0) barrier.expected = expected;
  if (barrier.expected != expected) failf("%s %d is of %d threads for some and of %d for others", what, id, barrier.expected, expected);
  mine = barrier.generation;
  progress = true;
  if (++barrier.arrived == expected) barrier.arrived = 0, ++barrier.generation, may_lull();
  return barrier;
}
void barrier(int id, int threads) {
  u64 mine;
  current->of.barrier = &come_to(id, threads, "bar.sync", mine);
  wait(Wait::kBarrier, mine, "bar.sync", static_cast<u32>(id));
}
void barrier_arrive(int id, int threads) {
  u64 mine;
  come_to(id, threads, "bar.arrive", mine);
  pause();
}

void cluster_ctarank(u32& d) { d = static_cast<u32>(current->cta->rank); }
void cluster_nctarank(u32& d) { d = static_cast<u32>(ctas.size()); }
void mapa(u32& d, u32 address, u32 rank) {
  if (rank >= ctas.size()) failf("mapa: the cluster has no CTA %u", rank);
  d = (rank + 1) << kRankShift | address;
}
void cluster_arrive() {
  if (current->cluster_arrivals > cluster_phase) fail("barrier.cluster.arrive twice without a wait");
  current->cluster_arrivals = cluster_phase + 1;
  ++cluster_arrived, progress = true;
  check_cluster();
  pause();
}
void cluster_wait() {
  if (current->cluster_arrivals == 0) fail("barrier.cluster.wait without an arrive");
  wait(Wait::kCluster, current->cluster_arrivals - 1, "barrier.cluster.wait");
}

// ---- memory ----

void ld_shared_u32(u32& d, u32 address) { std::memcpy(&d, own(address, 4, 4, "ld.shared"), 4); }
void ld_shared_f32(float& d, u32 address) { std::memcpy(&d, own(address, 4, 4, "ld.shared"), 4); }
void ld_shared_v2_f32(float& d0, float& d1, u32 address) {
  const unsigned char* const from = own(address, 8, 8, "ld.shared.v2");
  std::memcpy(&d0, from, 4), std::memcpy(&d1, from + 4, 4);
}
void ld_shared_v4_u32(u32& d0, u32& d1, u32& d2, u32& d3, u32 address) {
  const unsigned char* const from = own(address, 16, 16, "ld.shared.v4");
  std::memcpy(&d0, from, 4), std::memcpy(&d1, from + 4, 4), std::memcpy(&d2, from + 8, 4), std::memcpy(&d3, from + 12, 4);
}
void atom_add(int& before, int* to, int value) {
  before = *to, *to += value;
  pause();
}

namespace {

// The two elements of 16 bits that a lane has of an 8 x 8 matrix whose rows begin at what lanes from 8 `which` on have.
template <typename Do>
void of_matrix(const Round& round, int which, bool transposed, const char* what, Do run) {
  for (int lane = 0; lane < kWarp; ++lane)
    for (int i = 0; i < 2; ++i) {
      const int far = lane / 4, near = lane % 4 * 2 + i, row = transposed ? near : far, column = transposed ? far : near;
      run(lane, i, own(round.in[8 * which + row][0], 16, 16, what) + 2 * column);
    }
}

void load_matrices(const char* what, u32 (&d)[4], u32 address, bool transposed) {
  const u32* const found = meet(what, {address}, [&](Round& round) {
    for (int which = 0; which < 4; ++which)
      of_matrix(round, which, transposed, what, [&](int lane, int i, const unsigned char* from) {
        std::memcpy(reinterpret_cast<unsigned char*>(&round.out[lane][which]) + 2 * i, from, 2);
      });
  });
  std::copy(found, found + 4, d);
}

void store_matrices(const char* what, u32 address, std::initializer_list<u32> words) {
  const int count = static_cast<int>(words.size());
  const u32* const w = words.begin();
  const u32 third = count > 2 ? w[2] : 0, fourth = count > 2 ? w[3] : 0;
  meet(what, {address, w[0], w[1], third, fourth}, [&](Round& round) {
    for (int which = 0; which < count; ++which)
      of_matrix(round, which, true, what, [&](int lane, int i, unsigned char* to) {
        std::memcpy(to, reinterpret_cast<const unsigned char*>(&round.in[lane][1 + which]) + 2 * i, 2);
      });
  });
}

}  // namespace

void ldmatrix_x4(u32& d0, u32& d1, u32& d2, u32& d3, u32 address) {
  u32 d[4];
  load_matrices("ldmatrix", d, address, false);
  d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3];
}
void ldmatrix_x4_trans(u32& d0, u32& d1, u32& d2, u32& d3, u32 address) {
  u32 d[4];
  load_matrices("ldmatrix.trans", d, address, true);
  d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3];
}
void stmatrix_x4_trans(u32 address, u32 a0, u32 a1, u32 a2, u32 a3) { store_matrices("stmatrix.x4", address, {a0, a1, a2, a3}); }
void stmatrix_x2_trans(u32 address, u32 a0, u32 a1) { store_matrices("stmatrix.x2", address, {a0, a1}); }

void cp_async_16(u32 to, const void* from, int bytes) {
  own(to, 16, 16, "cp.async");
  if (reinterpret_cast<uintptr_t>(from) % 16 || bytes < 0 || bytes > 16) fail("cp.async: not from a multiple of 16 bytes, or of too many");
  const Copy copy{to, from, bytes};
  landing == kAtOnce ? run(copy) : current->copies.open.push_back(copy);
}
void cp_async_commit() { current->copies.commit(); }
void cp_async_wait(int pending) {
  current->copies.complete(static_cast<size_t>(pending), [](const Copy& copy) { run(copy); });
}

void mbarrier_init(u32 address, u32 arrivals) {
  const u64 magic = kMagic;
  std::memcpy(own(address, 8, 8, "mbarrier.init"), &magic, 8);
  MBarrier barrier;
  barrier.expected = barrier.pending = arrivals;
  if (arrivals == 0 || !current->cta->mbarriers.emplace(address, barrier).second)
    failf("mbarrier.init at %#x: it is one already, or is for no arrivals", address);
}
void mbarrier_arrive(u32 address) {
  arrive(*current->cta, address, "mbarrier.arrive");
  pause();
}
void mbarrier_arrive_expect(u32 address, u32 bytes) {
  arrive(*current->cta, address, "mbarrier.arrive.expect_tx", bytes);
  pause();
}
void mbarrier_arrive_remote(u32 address, u32 rank) {
  const char* const what = "mbarrier.arrive of the cluster";
  if (rank >= ctas.size()) failf("%s: there is no CTA %u", what, rank);
  must_be_there(ctas[rank], what);
  arrive(ctas[rank], address, what);
  pause();
}
void mbarrier_wait(u32 address, u32 parity) {
  current->of.mbarrier = &mbarrier(*current->cta, address, "mbarrier.try_wait");
  wait(Wait::kMBarrier, parity & 1, "mbarrier.try_wait", address);
}

void bulk_copy(u32 to, const void* from, u32 bytes, u32 barrier, u64) {
  const char* const what = "cp.async.bulk";
  Cta& cta = *current->cta;
  if (bytes == 0 || bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16) failf("%s of %u bytes from %p", what, bytes, from);
  at(cta, to, bytes, 16, what);
  send(Flight{Flight::kBulk, &cta, to, bytes, &mbarrier(cta, barrier, what), from, {}, 0, 0, {}});
}
void tensor_copy(u32 to, const void* map, int x, int y, u32 barrier, u64) {
  copy_box(*current->cta, to, map, x, y, barrier, "cp.async.bulk.tensor");
}
void tensor_copy_multicast(u32 to, const void* map, int x, int y, u32 barrier, u16 mask, u64) {
  if (mask >> ctas.size()) fail("cp.async.bulk.tensor.multicast to CTAs that the cluster has not");
  for (Cta& cta : ctas)
    if (mask >> cta.rank & 1) copy_box(cta, to, map, x, y, barrier, "cp.async.bulk.tensor.multicast");
}
void tensor_store(const void* map, int x, int y, u32 from) {
  const Store store{matrix(map, "tensor store"), x, y, from};
  own(from, static_cast<u32>(store.map.box_rows * 128), 128, "tensor store");
  current->stores.open.push_back(store);
}
void bulk_commit() {
  current->stores.commit();
  if (landing == kAtOnce || (landing == kSometime && random_below(2))) {
    // They stay to be waited for, but nothing is left to do.
    for (auto& group : current->stores.closed) {
      for (const Store& store : group) run(store);
      group.clear();
    }
  }
}
void bulk_wait_read(int pending) {
  current->stores.complete(static_cast<size_t>(pending), [](const Store& store) { run(store); });
}
void st_async_v2(u32 to, float x, float y, u32 barrier) {
  const float values[] = {x, y};
  store_words(to, values, 8, barrier);
}
void st_async_v4(u32 to, float x, float y, float z, float w, u32 barrier) {
  const float values[] = {x, y, z, w};
  store_words(to, values, 16, barrier);
}

// ---- products ----

namespace {

// Element i of k, which registers have in their order, as a number.
double element(Type type, u32 word, int i) {
  switch (type) {
    case Type::kBf16:
    case Type::kF16: return pair_value(type, word, i);
    case Type::kTf32: return bits_of<float>(word & ~0x1fffu);
    case Type::kS8: return static_cast<int8_t>(word >> (8 * i));
    case Type::kE4m3: return e4m3_to_double(word >> (8 * i) & 0xff);
  }
  return 0;
}

int in_word(Type type) { return type == Type::kTf32 ? 1 : type == Type::kBf16 || type == Type::kF16 ? 2 : 4; }

// PTX, fragments of m16n8: with g = lane / 4 and t = lane % 4, a register of A or B has consecutive k, from t times as many as it has on,
// and the second half of k comes after the first:
//   A: row g, row g + 8; then the same of the second half      B: column g; then the second half
//   D: row g, columns 2 t and 2 t + 1; then row g + 8
template <typename Word>
void fragment_of_a(Type type, int k, double (&a)[16][32], Word word) {
  const int each = in_word(type), half = 4 * each;
  for (int lane = 0; lane < kWarp; ++lane)
    for (int part = 0; part < k / half; ++part)
      for (int r = 0; r < 2; ++r)
        for (int i = 0; i < each; ++i) a[lane / 4 + 8 * r][part * half + lane % 4 * each + i] = element(type, word(lane, 2 * part + r), i);
}

}  // namespace

void mma(Type type, int k, float* d, const u32* a, const u32* b, const float (&c)[4]) {
  const int each = in_word(type), halves = k / (4 * each);
  u32 words[kWords] = {};
  std::copy(a, a + 2 * halves, words), std::copy(b, b + halves, words + 4), std::memcpy(words + 6, c, 16);
  const auto& w = words;
  const u32* const out = meet("mma", {w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8], w[9]}, [&](Round& round) {
    static double A[16][32], B[32][8];
    fragment_of_a(type, k, A, [&](int lane, int i) { return round.in[lane][i]; });
    for (int lane = 0; lane < kWarp; ++lane)
      for (int half = 0; half < halves; ++half)
        for (int i = 0; i < each; ++i) B[half * 4 * each + lane % 4 * each + i][lane / 4] = element(type, round.in[lane][4 + half], i);
    for (int lane = 0; lane < kWarp; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        double sum = 0;
        for (int j = 0; j < k; ++j) sum += A[row][j] * B[j][column];
        if (type == Type::kS8)
          round.out[lane][i] = static_cast<u32>(static_cast<int>(sum) + static_cast<int>(round.in[lane][6 + i]));
        else
          round.out[lane][i] = bits_of<u32>(static_cast<float>(sum + bits_of<float>(round.in[lane][6 + i])));
      }
  });
  std::memcpy(d, out, 16);
}

void mma_s8(int& d0, int& d1, int& d2, int& d3, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, u32 c0, u32 c1, u32 c2, u32 c3) {
  const u32 a[] = {a0, a1, a2, a3}, b[] = {b0, b1};
  float d[4];
  mma(Type::kS8, 32, d, a, b, {bits_of<float>(c0), bits_of<float>(c1), bits_of<float>(c2), bits_of<float>(c3)});
  d0 = bits_of<int>(d[0]), d1 = bits_of<int>(d[1]), d2 = bits_of<int>(d[2]), d3 = bits_of<int>(d[3]);
}

namespace {

// Row `row` of an operand in shared memory, of so many bytes: rows of 128 bytes in the 128-byte swizzle, eight of them beside each other.
void row_of(u64 descriptor, int row, int bytes, unsigned char* to) {
  if (descriptor >> 62 != 1) fail("wgmma: the descriptor has no 128-byte swizzle");
  const u32 start = static_cast<u32>(descriptor & 0x3fff) << 4, stride = static_cast<u32>(descriptor >> 32 & 0x3fff) << 4;
  for (int byte = 0; byte < bytes; byte += 16) {
    const u32 address = swizzled(start + static_cast<u32>(row / 8) * stride + static_cast<u32>(row % 8 * 128 + byte));
    std::memcpy(to + byte, own(address, 16, 16, "wgmma"), 16);
  }
}

// One instruction of all lanes of the current warp: 16 rows of the warpgroup's 64.
void run(const Wgmma* const (&lanes)[kWarp]) {
  const Wgmma& one = *lanes[0];
  for (const Wgmma* lane : lanes)
    if (lane->type != one.type || lane->columns != one.columns || lane->a_descriptor != one.a_descriptor ||
        lane->b_descriptor != one.b_descriptor || lane->add != one.add || !lane->a != !one.a)
      fail("the lanes of its warp are in different wgmmas");
  const Type type = one.type;
  const int each = in_word(type), k = 8 * each;
  static double A[16][32], B[256][32];
  u32 words[8];
  if (one.a) {
    fragment_of_a(type, k, A, [&](int lane, int i) { return lanes[lane]->a[i]; });
  } else {
    const int first = current->thread / kWarp % 4 * 16;
    for (int row = 0; row < 16; ++row) {
      row_of(one.a_descriptor, first + row, 32, reinterpret_cast<unsigned char*>(words));
      for (int j = 0; j < k; ++j) A[row][j] = element(type, words[j / each], j % each);
    }
  }
  for (int column = 0; column < one.columns; ++column) {
    row_of(one.b_descriptor, column, 32, reinterpret_cast<unsigned char*>(words));
    for (int j = 0; j < k; ++j) B[column][j] = element(type, words[j / each], j % each);
  }
  for (int lane = 0; lane < kWarp; ++lane)
    for (int i = 0; i < one.columns / 2; ++i) {
      const double *const a = A[lane / 4 + i / 2 % 2 * 8], *const b = B[i / 4 * 8 + lane % 4 * 2 + i % 2];
      double sum = 0;
      for (int j = 0; j < k; ++j) sum += a[j] * b[j];
      if (type == Type::kS8) {
        int* const d = static_cast<int*>(lanes[lane]->d) + i;
        *d = (one.add ? *d : 0) + static_cast<int>(sum);
      } else {
        float* const d = static_cast<float*>(lanes[lane]->d) + i;
        *d = static_cast<float>((one.add ? *d : 0) + sum);
      }
    }
}

}  // namespace

void wgmma(Type type, int columns, void* d, const u32* a, u64 a_descriptor, u64 b_descriptor, int add) {
  current->wgmmas.open.push_back({type, columns, d, a, a_descriptor, b_descriptor, add != 0});
}
void wgmma_fence() {}
void wgmma_commit() { current->wgmmas.commit(); }
void wgmma_wait(int pending) {
  meet("wgmma.wait_group", {static_cast<u32>(pending)}, [&](Round&) {
    Fiber* const fibers = current->cta->fibers.data() + current->thread / kWarp * kWarp;
    const size_t groups = fibers[0].wgmmas.closed.size(), due = groups > static_cast<size_t>(pending) ? groups - pending : 0;
    for (int lane = 0; lane < kWarp; ++lane)
      if (fibers[lane].wgmmas.closed.size() != groups) fail("the lanes of its warp have committed different groups of wgmmas");
    for (size_t group = 0; group < due; ++group)
      for (size_t i = 0; i < fibers[0].wgmmas.closed[group].size(); ++i) {
        const Wgmma* lanes[kWarp];
        for (int lane = 0; lane < kWarp; ++lane) {
          const auto& mine = fibers[lane].wgmmas.closed[group];
          if (mine.size() != fibers[0].wgmmas.closed[group].size()) fail("the lanes of its warp have different groups of wgmmas");
          lanes[lane] = &mine[i];
        }
        run(lanes);
      }
    for (int lane = 0; lane < kWarp; ++lane) {
      auto& closed = fibers[lane].wgmmas.closed;
      closed.erase(closed.begin(), closed.begin() + static_cast<long>(due));
    }
  });
}

}  // namespace host
