// What only a Hopper GPU has, by names that the tests can give another meaning to: they run the kernels on a CPU.
#ifndef ARCHIPELAGO_HOPPER
#define ARCHIPELAGO_HOPPER

#include <cstdint>

// The shared memory that a launch asks for.
__device__ inline uint8_t* dynamic_memory() {
  extern __shared__ uint8_t memory[];
  return memory;
}
__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Start the copy of 16 or 4 bytes to shared memory, or of as many zeros where there is nothing to copy.
__device__ inline void copy16(uint32_t to, const void* from, bool real) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(real ? 16 : 0));
}
__device__ inline void copy4(uint32_t to, const void* from, bool real) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(real ? 4 : 0));
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;"); }
template <int PENDING> __device__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
// Lets the tensor cores see what this thread has copied; a barrier is to follow.
__device__ inline void show_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void finish_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// Adds the product of two described tiles of 64 and of N rows over 16 dimensions to sums; `more` is 0 for the first.
template <int N> __device__ void multiply(float (&sums)[N / 2], uint64_t a, uint64_t b, int more);

#define SUMS_8(i)                                                                                            \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), "+f"(sums[i + 5]), \
      "+f"(sums[i + 6]), "+f"(sums[i + 7])

template <> __device__ inline void multiply<16>(float (&sums)[8], uint64_t a, uint64_t b, int more) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %10, 0; wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, p, 1, 1, 0, 0; }"
      : SUMS_8(0)
      : "l"(a), "l"(b), "r"(more));
}
template <> __device__ inline void multiply<32>(float (&sums)[16], uint64_t a, uint64_t b, int more) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %18, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, p, 1, 1, 0, 0; }"
      : SUMS_8(0), SUMS_8(8)
      : "l"(a), "l"(b), "r"(more));
}
template <> __device__ inline void multiply<64>(float (&sums)[32], uint64_t a, uint64_t b, int more) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
      "%23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, 0; }"
      : SUMS_8(0), SUMS_8(8), SUMS_8(16), SUMS_8(24)
      : "l"(a), "l"(b), "r"(more));
}
#undef SUMS_8

// Launches a kernel with so many bytes of dynamic shared memory; returns a cudaError_t.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, int bytes, void* stream, Arguments... arguments) {
  const cudaError_t failed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (failed != cudaSuccess) return failed;
  kernel<<<grid, threads, bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
}
inline const char* name_of(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

#endif
