#include "cache_folder.hpp"

#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <system_error>

#include "enat/enat.hpp"
#include "messages.hpp"

namespace enat {

std::filesystem::path cache_folder(const std::string& hash, const std::string& kind) {
    const auto set = [](const char* name) { return std::getenv(name) != nullptr && *std::getenv(name) != '\0'; };
    const bool chosen = std::getenv("ENAT_CACHE") != nullptr;
    std::filesystem::path root;
    if (chosen) {
        root = std::getenv("ENAT_CACHE");
    } else if (set("XDG_CACHE_HOME")) {
        root = std::filesystem::path(std::getenv("XDG_CACHE_HOME")) / "enat";
    } else if (set("HOME")) {
        root = std::filesystem::path(std::getenv("HOME")) / ".cache" / "enat";
    }
    if (root.empty()) return {};
    std::error_code error;
    const std::filesystem::path folder = std::filesystem::absolute(root, error) / kind / hash.substr(0, 16);  // wherever the program goes
    std::filesystem::create_directories(folder, error);
    if (!error && access(folder.c_str(), W_OK | X_OK) != 0) error.assign(errno, std::generic_category());
    if (!error) return folder;
    if (chosen) throw InputError(shown(root) + ": the cache folder (ENAT_CACHE) cannot be written: " + error.message());
    return {};
}

}  // namespace enat
