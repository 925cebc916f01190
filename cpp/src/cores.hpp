// How many CPU threads this process can keep busy: in a container fewer than the machine has.
#pragma once

#include <filesystem>
#include <optional>
#include <vector>

namespace enat {

/// The threads that the CPU runs at once.
int machine_threads();

/// The machine's cores, of which each may run two threads or more at once.
int machine_cores();

/// On how many cores CPUs are; where the system does not tell, as many as they are.
int core_count(const std::vector<int>& cpus, const std::filesystem::path& root = "/");

/// The threads that the process may keep busy, where its affinity or the quota of a control group allows fewer than the machine has
/// cores; 0 where nothing limits it. ONNX Runtime knows nothing of quotas: its threads would wait for the one that is held back.
int allowed_threads();

/// The cores' worth of time that the process' control groups, versions 1 and 2, allow it; nothing where none sets a quota.
std::optional<double> least_quota(const std::filesystem::path& root = "/");

}  // namespace enat
