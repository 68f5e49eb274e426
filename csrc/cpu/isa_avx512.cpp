// The CPU kernels for AVX-512 F, BW, DQ, VL; its flags are in CMakeLists.txt.
#define LOTR_ISA avx512
#define LOTR_VB 64

#include "cpu/isa.h"
