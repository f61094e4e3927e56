// Which of the compiled instruction sets this processor runs.
//
// Files named *CPU.cpp are compiled once for each instruction set, with MIMDET_ISA set to its name; they define their
// functions in namespace mimdet::MIMDET_ISA and use no inline function of the standard library: the linker keeps one
// copy of those, perhaps the one that needs AVX-512.
#pragma once

#ifndef MIMDET_ISA
#include <cstdlib>
#include <cstring>

namespace mimdet {

enum class Isa { baseline, avx2, avx512 };

// The best set, or what MIMDET_CPU_ISA=baseline or avx2 in the environment asks for.
inline Isa isa() {
#if defined(__x86_64__)
  static const Isa best = [] {
    const char* asked = std::getenv("MIMDET_CPU_ISA");
    const bool baseline = asked && !std::strcmp(asked, "baseline"), avx2 = asked && !std::strcmp(asked, "avx2");
    __builtin_cpu_init();
    if (baseline) return Isa::baseline;
    if (!avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      return Isa::avx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
      return Isa::avx2;
    }
    return Isa::baseline;
  }();
  return best;
#else
  return Isa::baseline;
#endif
}

}  // namespace mimdet
#endif  // MIMDET_ISA

// MIMDET_DECLARE_ISA(void f(int)) declares f in the namespace of every instruction set;
// MIMDET_PICK_ISA(f) is the address of the best one.
#if defined(__x86_64__)
#define MIMDET_DECLARE_ISA(...)          \
  namespace mimdet {                     \
  namespace baseline { __VA_ARGS__; }    \
  namespace avx2 { __VA_ARGS__; }        \
  namespace avx512 { __VA_ARGS__; }      \
  }
#define MIMDET_PICK_ISA(f)                                          \
  (::mimdet::isa() == ::mimdet::Isa::avx512 ? &::mimdet::avx512::f  \
   : ::mimdet::isa() == ::mimdet::Isa::avx2 ? &::mimdet::avx2::f    \
                                            : &::mimdet::baseline::f)
#else
#define MIMDET_DECLARE_ISA(...)          \
  namespace mimdet {                     \
  namespace baseline { __VA_ARGS__; }    \
  }
#define MIMDET_PICK_ISA(f) (&::mimdet::baseline::f)
#endif
