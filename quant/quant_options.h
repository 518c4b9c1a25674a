// The options of llama-quant that say how to quantise: declared, parsed, and written down again for
// provenance.
#pragma once
#include <string>

#include "quant/quantize.h"
#include "runtime/cli.h"

namespace q4s {

void declare_quant_options(Cli&);
QuantizeOptions parse_options(const Cli&);  // throws Error(kUsage)

// All options that the bytes of a file depend on, as a JSON object.
std::string options_json(const Cli&, const QuantizeOptions&);

// "g32", "g64", "g128", "row" on `grid`, or "q8". Throws Error(kUsage) naming the option.
Format4 parse_format(const std::string& option, const std::string& text, GridKind grid);
std::regex exact_pattern(const std::string& name);  // matches one tensor name and no other

}  // namespace q4s
