// The CPU kernels for the compiler's baseline (SSE2 on x86-64, NEON on ARM); its flags are in CMakeLists.txt.
#define LOTR_ISA generic
#define LOTR_VB 16

#include "cpu/isa.h"
