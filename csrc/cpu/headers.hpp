// What the kernels include: before the pragma that switches the instruction set, so that the library's own inline functions stay plain.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "kernels.hpp"
#include "team.hpp"
#include "workspace.hpp"
