// What a .q4s file says about where it comes from, as JSON.
#pragma once
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "quant/calibration.h"
#include "quant/report.h"
#include "runtime/thread_pool.h"

namespace q4s {

// Name and checksum of each of a model's files, by name only: the same model elsewhere gives the same bytes.
nlohmann::ordered_json source_json(const std::string& path, ThreadPool& pool);
nlohmann::ordered_json calibration_json(const Calibration&);
nlohmann::ordered_json losses_json(const std::vector<BlockReport>&);  // of all linears

}  // namespace q4s
