// Includes the file that PER_INSTRUCTION_SET names once per instruction set, inside the namespaces baseline, avx2 and
// avx512, with VECTOR_BYTES set to the width of that set's registers. No include guard: every kernel has its own.
#define VECTOR_BYTES 16
namespace baseline {
#include PER_INSTRUCTION_SET
}
#undef VECTOR_BYTES

#ifdef THOUGHT_KERNELS_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define VECTOR_BYTES 32
namespace avx2 {
#include PER_INSTRUCTION_SET
}
#undef VECTOR_BYTES
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define VECTOR_BYTES 64
namespace avx512 {
#include PER_INSTRUCTION_SET
}
#undef VECTOR_BYTES
#pragma GCC pop_options
#endif
#undef PER_INSTRUCTION_SET
