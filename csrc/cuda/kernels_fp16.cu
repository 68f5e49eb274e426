// The kernels with a large matrix, for float16.
#include "launchers.cuh"

template struct lotr::cuda::Launchers<lotr::tile::Half<__half>>;
