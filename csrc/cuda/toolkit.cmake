# The architectures to compile for, and whether nvcc's CUDA fits torch's. Only functions, for CMakeLists.txt.

# LOTR_ARCHS: CMake's list; or all, for a wheel; or AUTO: the cards of this machine that the kernels and nvcc
# support, else 80 and 90a. The code of a card also runs on later minor versions (100 on 103), and the PTX of
# the entry without "-real" runs on later cards. 90a, not 90: only 90a has wgmma.
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
      message(STATUS "no GPU here: compiling for 80 (and newer cards, by its PTX) and 90a. LOTR_ARCHS=90a-real compiles only "
                     "for an H100, LOTR_ARCHS=all for all cards, LOTR_CUDA=OFF builds only the CPU kernels.")
    endif()
  endif()
  set(${result} "${wanted}" PARENT_SCOPE)
endfunction()

# The architectures of this machine's cards. Empty if nvcc does not support one of them.
function(lotr_cards result nvcc_version)
  set(archs)
  find_program(LOTR_NVIDIA_SMI nvidia-smi)
  if(LOTR_NVIDIA_SMI)
    execute_process(COMMAND ${LOTR_NVIDIA_SMI} --query-gpu=compute_cap --format=csv,noheader
                    OUTPUT_VARIABLE said RESULT_VARIABLE failed ERROR_QUIET)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]+" here "${said}")
    list(REMOVE_DUPLICATES here)
    foreach(card IN LISTS here)
      if(card VERSION_GREATER_EQUAL 10.0 AND nvcc_version VERSION_LESS 12.8)
        message(STATUS "a GPU of compute capability ${card} is here, which nvcc ${nvcc_version} does not know: it compiles PTX at "
                       "its first launch; CUDA 12.8 or later has code for it")
        set(archs)
        break()
      endif()
      string(REPLACE "." "" arch "${card}")
      string(REGEX REPLACE "^90$" "90a" arch "${arch}")
      if(card VERSION_GREATER_EQUAL 8.0)
        list(APPEND archs ${arch}-real)
      endif()
    endforeach()
  endif()
  set(${result} "${archs}" PARENT_SCOPE)
endfunction()

# Splits a list into architectures that are compiled, and nvcc's options for those that are assembled from
# another one's PTX: "-real" entries with a lower one of the same kind. The kernels' sources distinguish only
# before and after 9.0. The PTX is two thirds of the work, and 80, 86 and 89 share one.
function(lotr_share_ptx own_result options_result archs)
  set(own)
  set(options)
  foreach(arch IN LISTS archs)
    set(base)
    if(arch MATCHES "^([0-9]+)-real$")
      set(number ${CMAKE_MATCH_1})
      foreach(other IN LISTS archs)
        if(other MATCHES "^([0-9]+)(-real)?$")
          set(lower ${CMAKE_MATCH_1})
          if(lower LESS number AND (number LESS 90 OR lower GREATER_EQUAL 100) AND (NOT base OR lower LESS base))
            set(base ${lower})
          endif()
        endif()
      endforeach()
    endif()
    if(base)
      list(APPEND options "--generate-code=arch=compute_${base},code=[sm_${number}]")
    else()
      list(APPEND own ${arch})
    endif()
  endforeach()
  set(${own_result} "${own}" PARENT_SCOPE)
  set(${options_result} "${options}" PARENT_SCOPE)
endfunction()

# CUDA's version in torch's version.py, read without importing torch; "" for a torch without CUDA.
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

# Explains a difference of the major versions. The module contains a CUDA runtime, so a difference is not an
# error: only the driver must support both.
function(lotr_compare_cuda nvcc_version torch_version)
  string(REGEX MATCH "^[0-9]+" nvcc_major "${nvcc_version}")
  string(REGEX MATCH "^[0-9]+" torch_major "${torch_version}")
  if("${torch_version}" STREQUAL "")
    message(STATUS "nvcc is of CUDA ${nvcc_version}; this torch has no CUDA: the kernels are compiled for a torch that has")
  elseif(nvcc_major GREATER torch_major)
    message(WARNING "nvcc is of CUDA ${nvcc_version}, torch of CUDA ${torch_version}: the kernels will need a driver for CUDA "
                    "${nvcc_major}, which torch does not. On an older driver lotr_ext takes its composite, and says so "
                    "(python -m lotr_ext.info). Set CUDA_HOME to a CUDA ${torch_major} toolkit to avoid it.")
  elseif(nvcc_major LESS torch_major)
    message(STATUS "nvcc is of CUDA ${nvcc_version}, torch of CUDA ${torch_version}: the kernels run on every driver that torch runs on")
  endif()
endfunction()
