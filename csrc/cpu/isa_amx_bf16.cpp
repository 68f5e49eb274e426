// The CPU kernels for AVX-512 with products of BF16 in AMX tiles; its flags are in CMakeLists.txt.
#define LOTR_ISA amx_bf16
#define LOTR_VB 64

#include "cpu/isa.h"
