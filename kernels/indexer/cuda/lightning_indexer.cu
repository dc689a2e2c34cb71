// The lightning indexer for Hopper (sm_90a), without PyTorch: scores of a block of queries, and the picks by them.
//
// Scores lie in a buffer [B, R, S] of float32 of the R queries of each sequence from `first` on. scores_kernel holds
// 128 keys in shared memory and goes through some queries, whose heads pass through a ring of stages: keys x heads is
// one wgmma product per 64 keys, in bfloat16 with float32 sums. select_kernel has one block per query: it finds the
// least score picked by its bits (radix select: 11, 11 and 10 of them), then writes the places in rising order.
//
// Shape letters: B rows of the batch, T queries, R of them in a block, S keys, H heads of D dimensions, N heads with
// those added that are zero, K picks.

#include "hopper.cuh"

namespace {

constexpr int KEYS = 128;  // of a block of scores_kernel: 64 per warpgroup
constexpr int QUERIES = 64;  // that it goes through
constexpr int THREADS = 256;
constexpr int STAGES = 4;  // of its ring of queries
constexpr int ROW = 128;  // bytes of a row of a tile: 64 dimensions, swizzled in groups of 8 rows
constexpr int GROUP = 8 * ROW;
constexpr int SELECT_THREADS = 512;
constexpr int BINS = 2048;

// The keys [begin, end) that query t may read. Neither end ever falls from one query to the next.
struct Ranges {
  const int* begins;
  const int* ends;
  int T, S, causal;
  __device__ int begin(int t) const { return begins ? begins[t] : 0; }
  __device__ int end(int t) const { return ends ? ends[t] : causal ? S - T + t + 1 : S; }
};

// Starts the copy of rows of D numbers of bfloat16 to a tile: blocks of 64 dimensions, in each the rows one after the
// other, and of every row the eight pieces of 16 bytes in the order of the 128-byte swizzle.
template <int BLOCK_D, int ROWS> __device__ void copy_rows(uint32_t tile, const uint16_t* x, int rows, int D) {
  constexpr int PIECES = BLOCK_D / 8;
  for (int i = threadIdx.x; i < ROWS * PIECES; i += THREADS) {
    const int row = i / PIECES, piece = i % PIECES;
    const bool real = row < rows && piece * 8 < D;
    const uint32_t at = tile + (piece / 8) * ROWS * ROW + row * ROW + ((piece % 8) ^ (row % 8)) * 16;
    copy16(at, real ? x + static_cast<int64_t>(row) * D + piece * 8 : x, real);
  }
}

// Describes a tile to wgmma: along the dimensions, swizzled by 128 bytes, groups of 8 rows GROUP bytes apart.
__device__ uint64_t describe(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | (1ull << 16) | (static_cast<uint64_t>(GROUP >> 4) << 32) |
         (1ull << 62);
}

template <int BLOCK_D, int N> constexpr int STAGE = BLOCK_D / 64 * N * ROW + 1024;  // and the weights

template <int BLOCK_D, int N>
__global__ void __launch_bounds__(THREADS, 2)
    scores_kernel(const uint16_t* q, const uint16_t* k, const float* weights, float* scores, Ranges ranges, int first,
                  int R, int H, int D) {
  const int T = ranges.T, S = ranges.S, key = blockIdx.x * KEYS;
  const int64_t row = blockIdx.z;
  int from = blockIdx.y * QUERIES, to = min(from + QUERIES, R);
  while (from < to && ranges.end(first + from) <= key) ++from;
  while (from < to && ranges.begin(first + to - 1) >= key + KEYS) --to;
  if (from == to) return;

  uint8_t* const memory = dynamic_memory();
  const uint32_t key_tile = (shared_address(memory) + 1023) & ~1023u;  // swizzling goes by the address
  const uint32_t stages = key_tile + BLOCK_D / 64 * KEYS * ROW;
  const int in_group = threadIdx.x % 128, group = threadIdx.x / 128, lane = threadIdx.x % 32;

  auto copy_query = [&](int r, int slot) {
    const int64_t query = row * T + first + r;
    const uint32_t tile = stages + slot * STAGE<BLOCK_D, N>;
    copy_rows<BLOCK_D, N>(tile, q + query * H * D, H, D);
    if (threadIdx.x < N) {
      const bool real = threadIdx.x < H;
      copy4(tile + BLOCK_D / 64 * N * ROW + threadIdx.x * 4, real ? weights + query * H + threadIdx.x : weights, real);
    }
  };
  copy_rows<BLOCK_D, KEYS>(key_tile, k + (row * S + key) * D, min(KEYS, S - key), D);
  for (int ahead = 0; ahead < STAGES - 1; ++ahead) {
    if (from + ahead < to) copy_query(from + ahead, ahead);
    commit_copies();
  }

  for (int r = from, slot = 0; r < to; ++r, slot = (slot + 1) % STAGES) {
    wait_copies<STAGES - 2>();
    show_copies();
    __syncthreads();  // and nobody reads any more what is overwritten next
    if (r + STAGES - 1 < to) copy_query(r + STAGES - 1, (slot + STAGES - 1) % STAGES);
    commit_copies();

    const uint32_t tile = stages + slot * STAGE<BLOCK_D, N>;
    float sums[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) sums[i] = 0.0f;
    begin_products();
#pragma unroll
    for (int d = 0; d < BLOCK_D; d += 16) {
      const uint32_t within = d % 64 * 2;
      multiply<N>(sums, describe(key_tile + (d / 64 * KEYS + group * 64) * ROW + within),
                  describe(tile + d / 64 * N * ROW + within), d > 0);
    }
    finish_products();

    // A thread has keys lane / 4 and that + 8 of its warp's 16, and of every 8 heads two.
    const float* w = reinterpret_cast<const float*>(memory + (tile - shared_address(memory)) + BLOCK_D / 64 * N * ROW);
    float low = 0.0f, high = 0.0f;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const int head = i / 4 * 8 + lane % 4 * 2 + i % 2;
      const float match = sums[i] < 0.0f ? 0.0f : sums[i];  // NaN stays
      (i % 4 < 2 ? low : high) += head < H ? match * w[head] : 0.0f;
    }
#pragma unroll
    for (int other = 1; other < 4; other *= 2) {
      low += __shfl_xor_sync(~0u, low, other);
      high += __shfl_xor_sync(~0u, high, other);
    }
    const int at = key + group * 64 + in_group / 32 * 16 + lane / 4;
    float* out = scores + (row * R + r) * S;
    if (lane % 4 == 0 && at < S) out[at] = low;
    if (lane % 4 == 0 && at + 8 < S) out[at + 8] = high;
  }
}

// An unsigned number in the order of the scores: NaN as -inf, -0 as 0.
__device__ uint32_t ordered(float x) {
  uint32_t bits = x == x ? __float_as_uint(x) : 0xFF800000u;
  bits = bits == 0x80000000u ? 0u : bits;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Returns how many threads before this one say yes, and adds how many do in all. `counts` is shared, one per warp; a
// barrier has to lie between two uses of the same.
__device__ int count_before(bool yes, int* counts, int& all) {
  const unsigned votes = __ballot_sync(~0u, yes), lane = threadIdx.x % 32;
  if (lane == 0) counts[threadIdx.x / 32] = __popc(votes);
  __syncthreads();
  int before = __popc(votes & ((1u << lane) - 1)), total = 0;
#pragma unroll
  for (int warp = 0; warp < SELECT_THREADS / 32; ++warp) {
    before += warp < threadIdx.x / 32 ? counts[warp] : 0;
    total += counts[warp];
  }
  all = total;
  return before;
}

__global__ void __launch_bounds__(SELECT_THREADS)
    select_kernel(const float* scores, int* indices, Ranges ranges, int first, int R, int K) {
  __shared__ int counts[BINS], warps[2][SELECT_THREADS / 32], found[3];
  const int t = first + blockIdx.x, begin = ranges.begin(t), end = ranges.end(t), lane = threadIdx.x % 32;
  const int64_t row = blockIdx.y;
  scores += (row * R + blockIdx.x) * ranges.S;
  indices += (row * ranges.T + t) * K;

  uint32_t least = 0, known = 0;  // the bits found, and which those are
  int wanted = K, equal = K;
  for (int pass = 0; pass < 3 && end - begin > K; ++pass) {
    const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0, digits = pass == 2 ? 1023 : 2047;
    for (int bin = threadIdx.x; bin < BINS; bin += SELECT_THREADS) counts[bin] = 0;
    __syncthreads();
    for (int s = begin + static_cast<int>(threadIdx.x); s < end; s += SELECT_THREADS) {
      const uint32_t x = ordered(scores[s]);
      if ((x & known) == least) atomicAdd(&counts[x >> shift & digits], 1);
    }
    __syncthreads();
    // Each thread has four bins, the first thread the highest. In the bin looked for the sum reaches `wanted`.
    const int highest = BINS - 1 - 4 * static_cast<int>(threadIdx.x);
    int own = 0;
    for (int bin = 0; bin < 4; ++bin) own += counts[highest - bin];
    int sum = own;
    for (int by = 1; by < 32; by *= 2) {
      const int other = __shfl_up_sync(~0u, sum, by);
      if (lane >= by) sum += other;
    }
    if (lane == 31) warps[0][threadIdx.x / 32] = sum;
    __syncthreads();
    for (int warp = 0; warp < static_cast<int>(threadIdx.x) / 32; ++warp) sum += warps[0][warp];
    int above = sum - own;
    if (above < wanted && wanted <= sum) {
      int bin = highest;
      for (; above + counts[bin] < wanted; --bin) above += counts[bin];
      found[0] = bin, found[1] = wanted - above, found[2] = counts[bin];
    }
    __syncthreads();
    least |= static_cast<uint32_t>(found[0]) << shift;
    known |= static_cast<uint32_t>(digits) << shift;
    wanted = found[1], equal = found[2];
    __syncthreads();
  }

  int written = 0, passed = wanted - equal;  // of those equal, so many have yet to be passed by as it is below 0
  for (int start = begin; start < end; start += SELECT_THREADS) {
    const int s = start + static_cast<int>(threadIdx.x);
    const uint32_t x = s < end ? ordered(scores[s]) : 0;
    const bool level = s < end && x == least;
    int all;
    const int before = count_before(level, warps[0], all);
    const bool picked = s < end && (x > least || (level && passed + before >= 0));
    passed += all;
    const int slot = written + count_before(picked, warps[1], all);
    if (picked) indices[slot] = s;
    written += all;
  }
  for (int slot = written + static_cast<int>(threadIdx.x); slot < K; slot += SELECT_THREADS) indices[slot] = -1;
}

template <int BLOCK_D, int N>
int launch_scores(const uint16_t* q, const uint16_t* k, const float* weights, float* scores, Ranges ranges,
                          int B, int first, int R, int H, int D, void* stream) {
  constexpr int BYTES = 1024 + BLOCK_D / 64 * KEYS * ROW + STAGES * STAGE<BLOCK_D, N>;
  const dim3 grid((ranges.S + KEYS - 1) / KEYS, (R + QUERIES - 1) / QUERIES, B);
  return launch(scores_kernel<BLOCK_D, N>, grid, THREADS, BYTES, stream, q, k, weights, scores, ranges, first, R, H, D);
}

}  // namespace

// Both return a cudaError_t. begins and ends [T] may be null. q [B, T, H, D], k [B, S, D] in bfloat16, weights
// [B, T, H] in float32, H at most 64, D a multiple of 8 and at most 128, all contiguous and aligned to 16 bytes.
extern "C" int lightning_indexer_scores(const void* q, const void* k, const void* weights, void* scores,
                                        const void* begins, const void* ends, int B, int T, int S, int H, int D,
                                        int first, int R, int causal, void* stream) {
  const Ranges ranges{static_cast<const int*>(begins), static_cast<const int*>(ends), T, S, causal};
  auto of_64 = H <= 16 ? launch_scores<64, 16> : H <= 32 ? launch_scores<64, 32> : launch_scores<64, 64>;
  auto of_128 = H <= 16 ? launch_scores<128, 16> : H <= 32 ? launch_scores<128, 32> : launch_scores<128, 64>;
  auto of_size = D <= 64 ? of_64 : of_128;
  return of_size(static_cast<const uint16_t*>(q), static_cast<const uint16_t*>(k), static_cast<const float*>(weights),
                static_cast<float*>(scores), ranges, B, first, R, H, D, stream);
}

extern "C" int lightning_indexer_select(const void* scores, void* indices, const void* begins, const void* ends, int B,
                                        int T, int S, int K, int first, int R, int causal, void* stream) {
  const Ranges ranges{static_cast<const int*>(begins), static_cast<const int*>(ends), T, S, causal};
  return launch(select_kernel, dim3(R, B), SELECT_THREADS, 0, stream, static_cast<const float*>(scores),
                static_cast<int*>(indices), ranges, first, R, K);
}

extern "C" const char* lightning_indexer_error(int error) { return name_of(error); }
