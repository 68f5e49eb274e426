// The CPU kernels for AVX-512 with BF16 dot products; its flags are in CMakeLists.txt.
#define LOTR_ISA avx512_bf16
#define LOTR_VB 64

#include "cpu/isa.h"
