// The kernels with a large matrix, for bfloat16.
#include "launchers.cuh"

template struct lotr::cuda::Launchers<lotr::tile::Half<__nv_bfloat16>>;
