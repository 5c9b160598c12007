# The CUDA sources, for the CUDA compiler and for the emulation alike. Paths from src/cuda/.
set(FASTNN_CUDA_KERNELS
  attention/backward.cu
  attention/forward.cu
  device.cu
  elementwise/elementwise.cu
  gemm/gemm.cu
  norm/layer_norm.cu
  reduce/column_sum.cu
  softmax/softmax.cu)
set(FASTNN_CUDA_BINDINGS
  bind/attention.cpp
  bind/elementwise.cpp
  bind/gemm.cpp
  bind/module.cpp
  bind/norm.cpp
  bind/reduce.cpp
  bind/softmax.cpp)
