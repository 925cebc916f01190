// enat: from an engine directory (docs/ENGINE.md) to pictures, on ONNX Runtime.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

#define ENAT_API __attribute__((visibility("default")))

namespace enat {

/// The version that a program is compiled for; `version()` is the library's. Libraries of other major or minor numbers have another layout
/// of what lies in this header, and another name (libenat.so.0.1).
#define ENAT_VERSION "0.1.0"
ENAT_API const char* version() noexcept;

// Messages are one line: what was found, what was expected, what to do. All derive from Error; what else may be thrown is
// std::bad_alloc, and what a callback throws, which passes through.

class ENAT_API Error : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

/// An argument is out of its range or unknown.
class ENAT_API InputError : public Error {
    using Error::Error;
};

/// An engine directory is incomplete, altered, of a newer format, or does not hold what was asked of it.
class ENAT_API EngineError : public Error {
    using Error::Error;
};

/// ONNX Runtime cannot load a graph, run it, or use the device.
class ENAT_API BackendError : public Error {
    using Error::Error;
};

/// A callback stopped the run.
class ENAT_API Stopped : public Error {
    using Error::Error;
};

/// Sizes of the network: grid² tokens an image, `codes` entries in the codebook, `num_classes` is the null label.
struct Model {
    std::int64_t grid = 0, dim = 0, heads = 0, encoder_depth = 0, decoder_depth = 0, codes = 0, num_classes = 0;
    std::optional<std::int64_t> image_size;
    std::vector<std::string> class_names;  // empty, or one a class

    std::int64_t length() const { return grid * grid; }
};

/// The engine's default sampling settings.
struct Sampling {
    std::int64_t steps = 0;
    double cfg_scale = 0, mask_temp = 0, samp_temp = 0;
};

/// Where an engine runs, and how it is loaded.
struct Options {
    std::string device = "cpu";  // or "cuda", "cuda:1", …
    std::string provider = "";   // "cpu", "cuda" or "tensorrt"; empty: cpu or cuda, by the device
    int threads = 0;             // on the CPU, shared by the slots; 0: one for each core that the process may use
    bool verify = false;         // hash files over 64 MiB too
    int slots = 1;               // batches in flight at once, each with memory of its own; further threads wait in turn
};

/// A class: its number or its name (ASCII case does not count). A name may be a number; "#7" is always number 7.
using Class = std::variant<std::int64_t, std::string>;

struct Tokens {
    std::size_t count = 0, grid = 0;
    std::vector<std::int64_t> values;  // [count, grid, grid]
    std::vector<std::uint64_t> seeds;  // one an image, where they were drawn

    const std::int64_t* operator[](std::size_t i) const { return values.data() + i * grid * grid; }
};

struct Images {
    std::size_t count = 0, height = 0, width = 0;
    std::vector<std::uint8_t> pixels;  // [count, height, width, 3], RGB
    Tokens tokens;                     // that they were made from

    const std::uint8_t* operator[](std::size_t i) const { return pixels.data() + i * height * width * 3; }
};

/// The batch being drawn, as it would be if the run ended after this step. Valid inside the callback.
class ENAT_API Preview {
public:
    /// Made only when asked for. Throws EngineError where the engine has no image decoder.
    virtual Images images() const = 0;
    /// Which tokens are not revealed yet: 0 or 1, [batch, grid, grid].
    virtual std::vector<std::uint8_t> masked() const = 0;

protected:
    Preview() = default;
    virtual ~Preview();
};

/// Called after every step with (step, steps, preview): steps are counted from 0, over all batches. Returning true stops the run. It
/// must not ask the pipeline for other pictures (InputError): the run holds a slot meanwhile, which they might wait for.
using Callback = std::function<bool(std::size_t, std::size_t, const Preview&)>;

/// What is free at run time. The engine's own settings where nothing is said.
struct Settings {
    int num = 1;                        // images a class
    std::optional<std::uint64_t> seed;  // image i of the request has seed + i (mod 2⁶⁴); drawn at random without one
    std::vector<std::uint64_t> seeds;   // or one an image
    std::optional<std::int64_t> steps;  // 1 … length
    std::optional<double> guidance;     // scale of the classifier-free guidance, 0 for none
    std::optional<double> mask_temperature, sampling_temperature;  // at the first step, falling to 0
    int batch_size = 8;                                            // images drawn at once, at most
    Callback callback;
};

/// An engine, loaded. One pipeline may be used from several threads at once.
class ENAT_API Pipeline {
public:
    /// Throws EngineError for an engine that is incomplete, altered or too new, BackendError where ONNX Runtime cannot load its
    /// graphs, InputError for options out of their range.
    explicit Pipeline(const std::filesystem::path& engine, const Options& options = {});
    /// What was moved from can be destroyed or assigned to, and nothing else.
    Pipeline(Pipeline&&) noexcept;
    Pipeline& operator=(Pipeline&&) noexcept;
    ~Pipeline();

    /// Draws pictures, class by class. Throws EngineError where the engine has no image decoder, InputError for a setting out of its
    /// range, Stopped where the callback stopped the run.
    Images generate(const std::vector<Class>& classes, const Settings& settings = {}) const;

    /// Draws tokens alone.
    Tokens generate_tokens(const std::vector<Class>& classes, const Settings& settings = {}) const;

    /// The pictures of tokens, so many at once. Throws InputError for tokens that are none, EngineError where the engine has no image
    /// decoder.
    Images decode(const Tokens& tokens, int batch_size = 8) const;

    /// The number of a class. Throws InputError for what is unknown or ambiguous.
    std::int64_t class_index(const Class& wanted) const;

    const Model& model() const;
    const Sampling& sampling() const;
    /// Whether the engine makes pictures, or tokens only.
    bool has_images() const;

private:
    struct Loaded;
    std::unique_ptr<Loaded> loaded_;
};

}  // namespace enat
