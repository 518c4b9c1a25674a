// Q4S_WIDE before a function of plain loops: it is compiled once for each generation of vector units and
// chosen when the program starts. Products and sums are never fused, so all of them give the same bits. (The
// thread sanitizer breaks the choosing.)
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__)
#define Q4S_WIDE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define Q4S_WIDE
#endif
