// How many CPU threads this process can keep busy: in a container fewer than the machine has.
#pragma once

#include <filesystem>
#include <optional>

namespace enat {

/// The threads that the CPU runs at once.
int machine_threads();

/// The threads that the process may keep busy, where its affinity or the quota of a control group allows fewer than the machine has; 0
/// where nothing limits it. ONNX Runtime knows nothing of quotas: its threads would wait for the one that is held back.
int allowed_threads();

/// The cores' worth of time that the process' control groups, versions 1 and 2, allow it; nothing where none sets a quota.
std::optional<double> least_quota(const std::filesystem::path& root = "/");

}  // namespace enat
