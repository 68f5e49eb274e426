// All kernels for float16.
#include "launchers.cuh"

template struct lotr::cuda::Launchers<lotr::tile::Half<__half>>;
