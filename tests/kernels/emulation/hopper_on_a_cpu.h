// Runs CUDA kernels on a CPU, one block after the other, each of its threads with a stack of its own and in turn until
// it waits for others: given with -include to a compiler, in place of kernels/indexer/cuda/hopper.cuh. Shared memory
// starts as NaN. The layouts of wgmma are those of the PTX manual: rows of 128 bytes, swizzled in groups of eight; four
// warps with 16 rows each.
#define ARCHIPELAGO_HOPPER
#define __device__
#define __global__
#define __launch_bounds__(...)
#define __shared__ static

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

using std::min;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx(0, 0, 0), blockIdx(0, 0, 0);

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool done = false;
};
inline std::vector<Thread> threads;
inline ucontext_t scheduler;
inline std::function<void()> run_thread;

inline void start_thread() {
  run_thread();
  threads[threadIdx.x].done = true;
  swapcontext(&threads[threadIdx.x].context, &scheduler);
}

// Lets the others run until all of `size` threads are here.
struct Barrier {
  int size, here = 0, passed = 0;
  void wait() {
    if (++here == size) {
      here = 0;
      ++passed;
      return;
    }
    for (const int before = passed; passed == before;) swapcontext(&threads[threadIdx.x].context, &scheduler);
  }
};
inline Barrier block_barrier;
inline std::vector<Barrier> warp_barriers;

inline void __syncthreads() { block_barrier.wait(); }

// What the lane `from` of the warp has.
template <typename T> T of_lane(T mine, int from) {
  static T shared[32][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  shared[warp][lane] = mine;
  warp_barriers[warp].wait();
  const T found = shared[warp][from];
  warp_barriers[warp].wait();
  return found;
}
template <typename T> T __shfl_xor_sync(unsigned, T mine, int by) { return of_lane(mine, threadIdx.x % 32 ^ by); }
template <typename T> T __shfl_up_sync(unsigned, T mine, int by) {
  const int lane = threadIdx.x % 32;
  return of_lane(mine, lane >= by ? lane - by : lane);
}
inline unsigned __ballot_sync(unsigned, bool mine) {
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= static_cast<unsigned>(of_lane<int>(mine, lane)) << lane;
  return votes;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline void atomicAdd(int* to, int x) { *to += x; }
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

constexpr int SHARED = 232448;  // bytes that a block of a Hopper GPU may have
constexpr uint32_t BEFORE = 80;  // shared memory does not begin at a round address
alignas(1024) inline uint8_t arena[SHARED];

inline uint8_t* dynamic_memory() { return arena; }
inline uint32_t shared_address(const void* p) { return static_cast<const uint8_t*>(p) - arena + BEFORE; }
inline void copy(uint32_t to, const void* from, int bytes, bool real) {
  if (to % bytes || reinterpret_cast<uintptr_t>(from) % bytes) std::abort();
  if (real) std::memcpy(arena + to - BEFORE, from, bytes);
  else std::memset(arena + to - BEFORE, 0, bytes);
}
inline void copy16(uint32_t to, const void* from, bool real) { copy(to, from, 16, real); }
inline void copy4(uint32_t to, const void* from, bool real) { copy(to, from, 4, real); }
inline void commit_copies() {}
template <int PENDING> void wait_copies() {}
inline void show_copies() {}
inline void begin_products() {}
inline void finish_products() {}

// The number of bfloat16 in a row and a column of a described tile.
inline float element(uint64_t described, int row, int column) {
  const uint32_t start = (described & 0x3FFF) << 4, group = (described >> 32 & 0x3FFF) << 4;
  if (described >> 62 != 1) std::abort();
  uint32_t at = start + row / 8 * group + row % 8 * 128 + column * 2;
  at ^= (at >> 7 & 7) << 4;
  uint16_t high;
  std::memcpy(&high, arena + at - BEFORE, 2);
  const uint32_t bits = static_cast<uint32_t>(high) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
template <int N> void multiply(float (&sums)[N / 2], uint64_t a, uint64_t b, int more) {
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  for (int i = 0; i < N / 2; ++i) {
    const int row = warp * 16 + lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    float sum = more ? sums[i] : 0.0f;
    for (int d = 0; d < 16; ++d) sum += element(a, row, d) * element(b, column, d);
    sums[i] = sum;
  }
}

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int size, int bytes, void*, Arguments... arguments) {
  if (bytes > SHARED) return 1;
  threads.resize(size);
  run_thread = [=] { kernel(arguments...); };
  for (unsigned block = 0; block < grid.x * grid.y * grid.z; ++block) {
    blockIdx = dim3(block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y);
    std::memset(arena, 0xFF, SHARED);
    block_barrier = {size};
    warp_barriers.assign(size / 32, {32});
    for (auto& thread : threads) {
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.data();
      thread.context.uc_stack.ss_size = thread.stack.size();
      makecontext(&thread.context, start_thread, 0);
      thread.done = false;
    }
    for (int left = size; left > 0;) {
      left = 0;
      for (threadIdx.x = 0; threadIdx.x < size; ++threadIdx.x) {
        if (threads[threadIdx.x].done) continue;
        swapcontext(&scheduler, &threads[threadIdx.x].context);
        ++left;
      }
    }
  }
  return 0;
}
inline const char* name_of(int error) { return error ? "too much shared memory" : "no error"; }
