#pragma once

#include <cstdint>

#include "enat/enat.hpp"

namespace enat {

/// The index of one class. A string is a name, else a number; `#7` is always number 7. Throws InputError for what is unknown or
/// ambiguous.
std::int64_t class_index(const Model& model, const Class& wanted);

}  // namespace enat
