// The stream type of CUDA, for headers that programs built without CUDA read as well.
#pragma once

struct CUstream_st;
typedef struct CUstream_st* cudaStream_t;
