// All kernels for float32, exact.
#include "launchers.cuh"

template struct lotr::cuda::Launchers<lotr::tile::Exact>;
