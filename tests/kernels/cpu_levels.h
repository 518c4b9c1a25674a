// Runs a test on every instruction set that this machine has.
#pragma once
#include "doctest/doctest.h"
#include "kernels/cpu_features.h"

namespace q4s {

template <typename Test>
void on_every_level(Test test) {
  for (CpuLevel level : {CpuLevel::kPortable, CpuLevel::kAvx2, CpuLevel::kAvx512}) {
    if (level > best_cpu_level()) {
      MESSAGE("SKIPPED: no " << cpu_level_name(level) << " on this machine");
      continue;
    }
    CAPTURE(cpu_level_name(level));
    set_cpu_level(level);
    test();
  }
  set_cpu_level(best_cpu_level());
}

}  // namespace q4s
