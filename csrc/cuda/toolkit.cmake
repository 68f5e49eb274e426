# Functions for CMakeLists.txt: which architectures to compile for, and whether nvcc's CUDA fits
# torch's.

# Expands LOTR_ARCHS to CMake's list of architectures:
#
#   a list   itself
#   all      for a wheel: every architecture that nvcc supports
#   AUTO     this machine's cards from compute capability 8.0 on, if nvcc supports all of them,
#            else 80 and 90a
#
# Code for a compute capability also runs on its later minor versions (100 on 103). An entry without
# "-real" adds PTX, which runs on later cards. Hopper's entry is 90a and not 90: only 90a has wgmma.
function(lotr_archs result wanted nvcc_version)
  if(nvcc_version VERSION_LESS 12.8)
    set(all 80 86-real 89-real 90a-real)
  else()
    set(all 80-real 86-real 89-real 90a-real 100 120-real)
  endif()
  if(wanted STREQUAL "all")
    set(wanted "${all}")
  elseif(wanted STREQUAL "AUTO")
    lotr_cards(wanted "${nvcc_version}")
    if(NOT wanted)
      set(wanted 80 90a-real)
      message(STATUS "no GPU here that nvcc and the kernels support: compiling for 80 (newer cards "
                     "use its PTX) and 90a. LOTR_ARCHS=90a-real compiles only for an H100, "
                     "LOTR_ARCHS=all for all cards, LOTR_CUDA=OFF builds only the CPU kernels.")
    endif()
  endif()
  set(${result} "${wanted}" PARENT_SCOPE)
endfunction()

# Lists the architectures of this machine's cards. The list is empty if nvcc does not support one of
# them: lotr_archs then takes 80 and 90a, and the driver compiles the PTX of 80 for the others.
function(lotr_cards result nvcc_version)
  set(archs)
  find_program(LOTR_NVIDIA_SMI nvidia-smi)
  if(LOTR_NVIDIA_SMI)
    execute_process(COMMAND ${LOTR_NVIDIA_SMI} --query-gpu=compute_cap --format=csv,noheader
                    OUTPUT_VARIABLE capabilities ERROR_QUIET)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]+" cards "${capabilities}")
    list(REMOVE_DUPLICATES cards)
    execute_process(COMMAND ${LOTR_NVCC} --list-gpu-arch OUTPUT_VARIABLE supported)
    foreach(card IN LISTS cards)
      string(REPLACE "." "" arch "${card}")
      if(card VERSION_GREATER_EQUAL 8.0 AND NOT supported MATCHES "compute_${arch}\n")
        message(STATUS "nvcc ${nvcc_version} has no code for this machine's GPU of compute "
                       "capability ${card}: the driver will compile PTX at the first launch. A "
                       "later CUDA has code for it.")
        set(archs)
        break()
      endif()
      string(REGEX REPLACE "^90$" "90a" arch "${arch}")
      if(card VERSION_GREATER_EQUAL 8.0)
        list(APPEND archs ${arch}-real)
      endif()
    endforeach()
  endif()
  set(${result} "${archs}" PARENT_SCOPE)
endfunction()

# Compiles each PTX once, because PTX is two thirds of the work. Splits a list of architectures into
# those that are compiled, and nvcc's options for those that are assembled from the PTX of one of
# them. For 80;86-real;89-real;90a-real:
#
#   compiled_result   80;90a-real
#   options_result    --generate-code=arch=compute_80,code=[sm_86], and the same for sm_89
#
# A "-real" entry is assembled from the lowest other architecture of the list that is below it. An
# entry from 9.0 on uses only one from 10.0 on: the sources distinguish versions from 9.0 on.
function(lotr_share_ptx compiled_result options_result archs)
  set(compiled)
  set(options)
  foreach(arch IN LISTS archs)
    set(base)
    if(arch MATCHES "^([0-9]+)-real$")
      set(number ${CMAKE_MATCH_1})
      foreach(other IN LISTS archs)
        if(other MATCHES "^([0-9]+)(-real)?$")
          set(candidate ${CMAKE_MATCH_1})
          if(candidate LESS number AND (number LESS 90 OR candidate GREATER_EQUAL 100)
             AND (NOT base OR candidate LESS base))
            set(base ${candidate})
          endif()
        endif()
      endforeach()
    endif()
    if(base)
      list(APPEND options "--generate-code=arch=compute_${base},code=[sm_${number}]")
    else()
      list(APPEND compiled ${arch})
    endif()
  endforeach()
  set(${compiled_result} "${compiled}" PARENT_SCOPE)
  set(${options_result} "${options}" PARENT_SCOPE)
endfunction()

# Reads CUDA's version from torch's version.py, without importing torch. It is "" for a torch
# without CUDA.
function(lotr_torch_cuda result torch_folder)
  set(version "")
  if(EXISTS "${torch_folder}/version.py")
    file(STRINGS "${torch_folder}/version.py" line REGEX "^cuda[ :]")
    if("${line}" MATCHES "= *'([0-9]+\\.[0-9]+)")
      set(version "${CMAKE_MATCH_1}")
    endif()
  endif()
  set(${result} "${version}" PARENT_SCOPE)
endfunction()

# Explains a difference between the major versions. It is not an error: the module contains a CUDA
# runtime, so only the driver must support both.
function(lotr_compare_cuda nvcc_version torch_version)
  string(REGEX MATCH "^[0-9]+" nvcc_major "${nvcc_version}")
  string(REGEX MATCH "^[0-9]+" torch_major "${torch_version}")
  if("${torch_version}" STREQUAL "")
    message(STATUS "nvcc has CUDA ${nvcc_version}, this torch has none: the CUDA kernels need a "
                   "torch with CUDA")
  elseif(nvcc_major GREATER torch_major)
    message(WARNING "nvcc has CUDA ${nvcc_version}, torch has CUDA ${torch_version}: the kernels "
                    "will need a driver for CUDA ${nvcc_major}, and torch does not. With an older "
                    "driver lotr_ext runs the PyTorch fallback, as python -m lotr_ext.info shows. "
                    "Set CUDA_HOME to a CUDA ${torch_major} toolkit to avoid that.")
  elseif(nvcc_major LESS torch_major)
    message(STATUS "nvcc has CUDA ${nvcc_version}, torch has CUDA ${torch_version}: every driver "
                   "for torch can run the kernels")
  endif()
endfunction()
