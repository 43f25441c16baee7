// kernels_amx.cpp over the tiles of amx_soft.h: for tests, by the name amx-soft, on machines without AMX.
#include "amx_soft.h"
#define matrix_kernels_amx matrix_kernels_amx_soft
#include "kernels_amx.cpp"
