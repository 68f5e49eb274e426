// All kernels for float32, rounded to tf32.
#include "launchers.cuh"

template struct lotr::cuda::Launchers<lotr::tile::Tf32>;
