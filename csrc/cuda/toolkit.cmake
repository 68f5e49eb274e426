# What to compile for, and whether nvcc's CUDA goes with torch's. Functions only; CMakeLists.txt includes them.

# LOTR_ARCHS=AUTO: the cards of this machine where there are some that the kernels and nvcc serve, else one build for all.
# A card's code runs on later minor versions too (80 on 86 and 89, 100 on 103), so each list below serves every card from
# compute capability 8.0 on; the PTX of the entry without "-real" serves what comes after. 90a, not 90: wgmma is 90a's alone.
# 86, 89 and 120 are left to .ci/make_wheel and to machines that have such a card: each architecture takes one to one and a half
# minutes of a core; the first two run 80's code as it is, 120 compiles 100's PTX at its first launch.
function(lotr_archs result wanted nvcc_version)
  if(NOT wanted STREQUAL "AUTO")
    set(${result} "${wanted}" PARENT_SCOPE)
    return()
  endif()
  if(nvcc_version VERSION_LESS 12.8)
    set(all 80 90a-real)
  else()
    set(all 80-real 90a-real 100)
  endif()
  set(here)
  find_program(LOTR_NVIDIA_SMI nvidia-smi)
  if(LOTR_NVIDIA_SMI)
    execute_process(COMMAND ${LOTR_NVIDIA_SMI} --query-gpu=compute_cap --format=csv,noheader
                    OUTPUT_VARIABLE said RESULT_VARIABLE failed ERROR_QUIET)
    if(NOT failed)
      string(REGEX MATCHALL "[0-9]+\\.[0-9]+" here "${said}")
      list(REMOVE_DUPLICATES here)
    endif()
  endif()
  set(archs)
  foreach(card IN LISTS here)
    string(REPLACE "." "" arch "${card}")
    if(arch STREQUAL "90")
      set(arch 90a)
    endif()
    if(card VERSION_LESS 8.0)
      message(STATUS "a GPU of compute capability ${card} is here; the kernels need 8.0 or later, it runs the composite")
    elseif(card VERSION_GREATER_EQUAL 10.0 AND nvcc_version VERSION_LESS 12.8)
      message(STATUS "a GPU of compute capability ${card} is here, which nvcc ${nvcc_version} does not know: it compiles PTX at "
                     "its first launch; CUDA 12.8 or later has code for it")
      set(archs)
      break()
    else()
      list(APPEND archs ${arch}-real)
    endif()
  endforeach()
  if(NOT archs)
    set(archs ${all})
  endif()
  set(${result} "${archs}" PARENT_SCOPE)
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

# Says what it means where the major versions differ. The module has its own CUDA runtime inside, so a difference breaks
# nothing by itself: only the driver must serve both.
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
