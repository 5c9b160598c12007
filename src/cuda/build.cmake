# The module fastnn._cuda. With the static runtime it imports on a machine without a driver.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES OFF)  # chosen below
endif()
set(CMAKE_CUDA_STANDARD 17)  # the newest that every supported CMake knows how to ask for
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
include(src/cuda/sources.cmake)
list(TRANSFORM FASTNN_CUDA_KERNELS PREPEND src/cuda/)
list(TRANSFORM FASTNN_CUDA_HOPPER PREPEND src/cuda/)
list(TRANSFORM FASTNN_CUDA_BINDINGS PREPEND src/cuda/)

foreach(file IN LISTS FASTNN_CUDA_KERNELS)
  file(STRINGS ${file} hopper REGEX "#include.*ptx_sm90.cuh")
  if(hopper AND NOT file IN_LIST FASTNN_CUDA_HOPPER)
    message(FATAL_ERROR "${file} has to be in FASTNN_CUDA_HOPPER too: elsewhere its kernels would be empty")
  endif()
endforeach()

# sm_80 runs on everything from Ampere on, later GPUs get code of their own, and PTX is for GPUs that are newer than the
# compiler. All is made from one PTX, that of compute_80, so that the front end, half of the build's time and more, runs
# once; sm_90a's machine code comes out the same. Only what is written in Hopper's own instructions is compiled for it.
set(for_all -gencode=arch=compute_80,code=compute_80 -gencode=arch=compute_80,code=sm_80)
option(FASTNN_CUDA_SM_100 "Machine code for sm_100, where the compiler knows it; without it sm_100 gets the PTX" ON)
if(FASTNN_CUDA_SM_100 AND CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
  list(APPEND for_all -gencode=arch=compute_80,code=sm_100)
endif()
set_source_files_properties(${FASTNN_CUDA_KERNELS} PROPERTIES
  COMPILE_OPTIONS "${for_all};-gencode=arch=compute_80,code=sm_90a")
set_source_files_properties(${FASTNN_CUDA_HOPPER} PROPERTIES
  COMPILE_OPTIONS "${for_all};-gencode=arch=compute_90a,code=sm_90a")

pybind11_add_module(_cuda MODULE NO_EXTRAS ${FASTNN_CUDA_KERNELS} ${FASTNN_CUDA_BINDINGS})
set_target_properties(_cuda PROPERTIES ${FASTNN_CUDA_UNITY})  # of the bindings: the kernels have options of their own
target_include_directories(_cuda PRIVATE src src/cpp)
target_compile_options(_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CUDA>:-O3>
  $<$<COMPILE_LANGUAGE:CXX>:-O2 -Wall -Wextra>)
set_target_properties(_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static CXX_VISIBILITY_PRESET hidden
  CUDA_VISIBILITY_PRESET hidden)
target_link_libraries(_cuda PRIVATE CUDA::cudart_static)
install(TARGETS _cuda LIBRARY DESTINATION fastnn)
