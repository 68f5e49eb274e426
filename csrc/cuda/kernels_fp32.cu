// The kernels with a large matrix, for float32.
#include "launchers.cuh"

template struct lotr::cuda::Launchers<lotr::tile::Exact>;
