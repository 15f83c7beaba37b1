// The Python module of the extension. Operator schemas are defined in Python (thought_kernels/ops/library.py);
// the files of cpu/ and cuda/ add their kernels with TORCH_LIBRARY_IMPL when this library is loaded.
#include <pybind11/pybind11.h>

#define THOUGHT_KERNELS_QUOTE(...) #__VA_ARGS__
#define THOUGHT_KERNELS_TEXT(...) THOUGHT_KERNELS_QUOTE(__VA_ARGS__)

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
    module.doc() = "Compiled kernels of thought_kernels; loading it registers them with torch.library.";
#ifdef THOUGHT_KERNELS_CUDA
    module.attr("cuda_code") = THOUGHT_KERNELS_TEXT(THOUGHT_KERNELS_CUDA);  // such as "sm_80,sm_90,compute_90"
#else
    module.attr("cuda_code") = "";
#endif
}
