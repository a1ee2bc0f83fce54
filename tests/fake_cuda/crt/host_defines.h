/* In place of the CUDA compiler's header of this name, which PyTorch's wheels lack: driver_types.h
 * includes it. */
#define __device_builtin__
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __attribute__((aligned(n)))
#define CUDARTAPI
