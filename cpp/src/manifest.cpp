#include "manifest.hpp"

#include <sys/stat.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <vector>

#include "messages.hpp"
#include "sha256.hpp"

namespace enat {

namespace fs = std::filesystem;
using Json = nlohmann::json;

namespace {

constexpr std::int64_t newest_version = 1;
constexpr std::uint64_t hashed_at_load = 64ull << 20;  // bytes; larger files are checked by size alone unless verification is asked for
constexpr int deepest_written = 100;                   // levels of a manifest that is written again
constexpr std::int64_t largest_grid = 4096;            // grid² must be a number that memory can hold, and a counter word of the noise
constexpr std::int64_t largest = std::numeric_limits<std::int32_t>::max();

/// A value in a message. Arrays and objects are not spelled out: they may be nested deeper than a recursion can go.
std::string found(const Json* value) {
    if (value == nullptr) return "missing";
    if (value->is_object()) return value->empty() ? "an empty object" : "an object";
    if (value->is_array()) return "an array of " + std::to_string(value->size());
    const std::string text = value->dump(-1, ' ', /*ensure_ascii=*/true);
    return text.size() < 80 ? text : text.substr(0, 77) + "…";
}

/// Typed access to parsed JSON; every refusal names the file, the key, what was found and what was expected.
class Reader {
public:
    explicit Reader(fs::path file) : file_(std::move(file)) {}

    [[noreturn]] void refuse(const std::string& key, const std::string& is, const std::string& expected) const {
        throw EngineError(shown(file_) + ": " + one_line(key) + " is " + is + ", expected " + expected);
    }

    const Json* get(const Json& data, const char* key) const {
        const auto entry = data.find(key);
        return entry == data.end() ? nullptr : &*entry;
    }

    const Json& section(const Json& data, const char* key) const {
        const Json* value = get(data, key);
        if (value == nullptr || !value->is_object()) refuse(key, found(value), "an object");
        return *value;
    }

    std::int64_t integer(const Json& data, const char* key, std::int64_t least, std::int64_t most, const std::string& where = "") const {
        const Json* value = get(data, key);
        const auto number = value == nullptr ? std::nullopt : whole(*value);
        if (!number || *number < least || *number > most) {
            const bool both = most < largest || (number && *number > most);
            const std::string range = both ? std::to_string(least) + " to " + std::to_string(most) : "at least " + std::to_string(least);
            refuse(where + key, found(value), "an integer of " + range);
        }
        return *number;
    }

    double setting(const Json& data, const char* key) const {
        const Json* value = get(data, key);
        // NaN and infinity are no JSON, and what exceeds float64 is refused by the parser.
        if (value == nullptr || !value->is_number() || value->get<double>() < 0 || value->get<double>() > largest_setting) {
            refuse(key, found(value), "a number of 0 to 1e6");
        }
        return value->get<double>();
    }

    std::string text(const Json& data, const char* key, const std::string& where = "") const {
        const Json* value = get(data, key);
        if (value == nullptr || !value->is_string()) refuse(where + key, found(value), "a string");
        return value->get<std::string>();
    }

private:
    /// An integer that int64 holds; true and 1.0 are none.
    static std::optional<std::int64_t> whole(const Json& value) {
        if (!value.is_number_integer()) return std::nullopt;
        if (value.is_number_unsigned() &&
            value.get<std::uint64_t>() > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
            return std::nullopt;
        }
        return value.get<std::int64_t>();
    }

    fs::path file_;
};

std::string read_text(const fs::path& file) {
    std::ifstream stream(file, std::ios::binary);
    std::ostringstream text;
    text << stream.rdbuf();
    if (!stream) throw EngineError(shown(file) + ": cannot be read");
    return text.str();
}

Json parse(const fs::path& file, const std::string& text) {
    if (text.find('\0') != std::string::npos) throw EngineError(shown(file) + ": not valid JSON (it has a zero byte)");  // the parser's end
    try {
        return Json::parse(text);
    } catch (const Json::exception& error) {
        const std::string reason = error.what();  // "[json.exception.parse_error.101] parse error at …"
        const auto start = reason.find("] ");
        throw EngineError(shown(file) + ": not valid JSON (" + one_line(reason.substr(start == std::string::npos ? 0 : start + 2), 200) +
                          ")");
    }
}

Model read_model(const Reader& reader, const Json& data) {
    Model model;
    model.grid = reader.integer(data, "grid", 1, largest_grid);
    model.dim = reader.integer(data, "dim", 1, largest);
    model.heads = reader.integer(data, "heads", 1, largest);
    model.encoder_depth = reader.integer(data, "encoder_depth", 1, largest);
    model.decoder_depth = reader.integer(data, "decoder_depth", 1, largest);
    model.codes = reader.integer(data, "codes", 1, largest);
    model.num_classes = reader.integer(data, "num_classes", 1, largest);
    const Json* size = reader.get(data, "image_size");
    if (size != nullptr && !size->is_null()) model.image_size = reader.integer(data, "image_size", 1, largest);
    const Json* names = reader.get(data, "class_names");
    if (names != nullptr && !names->is_null()) {
        const std::string expected = std::to_string(model.num_classes) + " strings or null";
        if (!names->is_array() || names->size() != static_cast<std::size_t>(model.num_classes)) {
            reader.refuse("model.class_names", found(names), expected);
        }
        for (const Json& name : *names) {
            if (!name.is_string()) reader.refuse("model.class_names", found(names) + " with " + found(&name), expected);
            model.class_names.push_back(name.get<std::string>());
        }
    }
    return model;
}

/// Whether a name that is not empty, split at '/', has nothing but names in it, and so stays where it starts.
bool stays_inside(const std::string& name) {
    if (name.back() == '/' || name.find('\\') != std::string::npos || name.find('\0') != std::string::npos) return false;
    std::istringstream parts(name);
    for (std::string part; std::getline(parts, part, '/');) {
        if (part.empty() || part == "." || part == "..") return false;
    }
    return true;
}

bool lies_in(const fs::path& path, const fs::path& folder) {
    const fs::path inner = fs::canonical(path), outer = fs::canonical(folder);
    return std::mismatch(outer.begin(), outer.end(), inner.begin(), inner.end()).first == outer.end();
}

/// An entry of `files`.
File read_entry(const Reader& reader, const std::string& name, const Json& entry) {
    const std::string where = "files[" + Json(name).dump(-1, ' ', true) + "]";
    if (name.empty() || !stays_inside(name)) reader.refuse(where, "listed", "a path inside the engine directory");
    if (!entry.is_object()) reader.refuse(where, found(&entry), "an object with size and sha256");
    const std::int64_t size = reader.integer(entry, "size", 0, std::numeric_limits<std::int64_t>::max(), where + " ");
    return {size, reader.text(entry, "sha256", where + " "), {}};
}

/// Throws EngineError unless the file lies inside the directory with the size and hash of its entry. Returns its stamp.
Stamp check_file(const Manifest& manifest, const std::string& name, const File& entry, bool verify) {
    const fs::path path = manifest.root / name, said = manifest.folder / name;
    std::error_code error;  // also a name that no file can have
    if (!fs::is_regular_file(path, error)) {
        throw EngineError(shown(said) + ": missing; the manifest lists it with " + std::to_string(entry.size) + " bytes");
    }
    if (!lies_in(path, manifest.root)) {
        throw EngineError(shown(said) + ": leads out of the engine directory, to " + shown(fs::canonical(path)) +
                          "; cp -rL copies what links lead to");
    }
    const Stamp stamp = stamp_of(path);
    const auto actual_size = fs::file_size(path);
    if (actual_size != static_cast<std::uint64_t>(entry.size)) {
        throw EngineError(shown(said) + ": " + std::to_string(actual_size) + " bytes, expected " + std::to_string(entry.size) +
                          ": the file is truncated or from another engine");
    }
    if (!verify && actual_size > hashed_at_load) return stamp;
    if (const std::string actual = sha256(path); actual != entry.sha256) {
        throw EngineError(shown(said) + ": sha256 " + actual.substr(0, 16) + "…, expected " + one_line(entry.sha256, 16) +
                          ": the file was altered or is from another engine");
    }
    return stamp;
}

/// The hash of manifest.json without what was built from the engine, as the Python runtime writes it.
std::string identity(const std::string& text, const Json& data) {
    if (!data.contains("builds")) return sha256_of(text);
    int deepest = 0;
    auto ordered = nlohmann::ordered_json::parse(text, [&](int depth, nlohmann::ordered_json::parse_event_t, nlohmann::ordered_json&) {
        deepest = std::max(deepest, depth);
        return true;
    });
    if (deepest > deepest_written) return sha256_of(text);  // nobody's manifest: writing goes as deep into recursions
    ordered.erase("builds");
    return sha256_of(ordered.dump(1) + "\n");
}

Manifest read(const fs::path& folder, const fs::path& file, bool verify) {
    const fs::path root = fs::canonical(folder);
    const std::string text = read_text(root / file.filename());
    const Json data = parse(file, text);
    const Reader reader(file);
    if (!data.is_object()) reader.refuse("the manifest", found(&data), "an object");
    const Json* format = reader.get(data, "format");
    if (format == nullptr || *format != "enat-engine") reader.refuse("format", found(format), "\"enat-engine\"");
    const std::int64_t version = reader.integer(data, "version", 1, std::numeric_limits<std::int64_t>::max());
    if (version > newest_version) {
        throw EngineError(shown(file) + ": format version " + std::to_string(version) + " is newer than this library reads (up to " +
                          std::to_string(newest_version) + "); update enat");
    }
    Manifest manifest;
    manifest.folder = folder;
    manifest.root = root;
    manifest.hash = identity(text, data);
    manifest.model = read_model(reader, reader.section(data, "model"));
    const Json& sampling = reader.section(data, "sampling");
    manifest.sampling = {reader.integer(sampling, "steps", 1, manifest.model.length()), reader.setting(sampling, "cfg_scale"),
                         reader.setting(sampling, "mask_temp"), reader.setting(sampling, "samp_temp")};
    manifest.precision = reader.text(data, "precision");
    manifest.float_type = reader.text(data, "float_type");
    if (manifest.float_type != "float32" && manifest.float_type != "float16") {
        reader.refuse("float_type", found(reader.get(data, "float_type")), "float32 or float16");
    }
    if (data.contains("source")) reader.section(data, "source");
    if (data.contains("calibration")) {
        const Json& calibration = reader.section(data, "calibration");
        if (calibration.contains("weight_bits")) manifest.weight_bits = reader.integer(calibration, "weight_bits", 1, largest);
    }
    if (const Json* builds = reader.get(data, "builds"); builds != nullptr && !builds->is_array()) {
        reader.refuse("builds", found(builds), "an array");
    }
    const Json& files = reader.section(data, "files");
    for (const char* name : {"condition.onnx", "encoder.onnx", "decoder.onnx", "sampler.onnx"}) {
        if (!files.contains(name)) reader.refuse("files", "a list of " + std::to_string(files.size()), std::string(name) + " among them");
    }
    for (const char* name : {"image_decoder.onnx", "image_encoder.onnx"}) {
        if (files.contains(name) && !manifest.model.image_size) {
            reader.refuse("model.image_size", "null", std::string("a number, as ") + name + " is there");
        }
    }
    for (const auto& [name, entry] : files.items()) {
        File listed = read_entry(reader, name, entry);
        listed.stamp = check_file(manifest, name, listed, verify);
        manifest.files.emplace(name, std::move(listed));
    }
    return manifest;
}

}  // namespace

void Manifest::require_images() const {
    if (!has("image_decoder.onnx")) {
        throw EngineError(shown(folder) +
                          ": this engine has no image decoder and gives tokens only; ask for tokens, or export it again with its tokenizer "
                          "(--vqgan)");
    }
}

void Manifest::require_unchanged() const {
    for (const auto& [name, entry] : files) {
        if (stamp_of(root / name) == entry.stamp) continue;
        try {
            check_file(*this, name, entry, /*verify=*/true);  // on some file systems the same file has other numbers each time
        } catch (const EngineError& error) {
            throw EngineError(error.what() + std::string("; it was replaced while the engine was loaded"));
        } catch (const fs::filesystem_error& failed) {
            throw EngineError(shown(failed.path1()) + ": " + failed.code().message() + "; it was replaced while the engine was loaded");
        }
    }
}

Stamp stamp_of(const fs::path& file) {
    struct stat found {};
    if (stat(file.c_str(), &found) != 0) return {};
#ifdef __APPLE__
    const timespec changed = found.st_mtimespec;
#else
    const timespec changed = found.st_mtim;
#endif
    return std::array<std::int64_t, 4>{static_cast<std::int64_t>(found.st_dev), static_cast<std::int64_t>(found.st_ino),
                                       static_cast<std::int64_t>(found.st_size), changed.tv_sec * 1'000'000'000LL + changed.tv_nsec};
}

Manifest read_manifest(const fs::path& folder, bool verify) {
    const fs::path file = folder / "manifest.json";
    std::error_code error;
    if (!fs::is_regular_file(file, error)) {
        const std::string found = !fs::exists(folder, error)        ? "no such directory"
                                  : fs::is_directory(folder, error) ? "it has no manifest.json"
                                                                    : "a file";
        throw EngineError(shown(folder) + ": not an engine directory: " + found);
    }
    try {
        return read(folder, file, verify);
    } catch (const fs::filesystem_error& failed) {  // a file that vanished or may not be looked at
        throw EngineError(shown(failed.path1()) + ": " + failed.code().message());
    }
}

}  // namespace enat
