// The CPU kernels for AVX2, FMA, F16C; its flags are in CMakeLists.txt.
#define LOTR_ISA avx2
#define LOTR_VB 32

#include "cpu/isa.h"
