#include <algorithm>
#include <exception>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>

#include "classes.hpp"
#include "enat/enat.hpp"
#include "execution_providers.hpp"
#include "graphs.hpp"
#include "loop.hpp"
#include "manifest.hpp"
#include "messages.hpp"
#include "schedule.hpp"
#include "slots.hpp"

namespace enat {

const char* version() noexcept { return ENAT_VERSION; }

Preview::~Preview() = default;

namespace {

constexpr std::size_t largest_request = 1'000'000;  // pictures

/// Everything that a request asks for, checked.
struct Request {
    std::vector<std::int64_t> labels;  // one an image
    std::vector<std::uint64_t> seeds;  // one an image
    std::vector<Step> steps;
    std::size_t batch_size;
};

std::vector<std::uint64_t> image_seeds(const Settings& settings, std::size_t count) {
    if (!settings.seeds.empty()) {
        if (settings.seed) throw InputError("expected a seed or one for each image, got both");
        if (settings.seeds.size() != count) {
            throw InputError("expected one seed for each of " + std::to_string(count) + " images, got " +
                             std::to_string(settings.seeds.size()));
        }
        return settings.seeds;
    }
    const std::uint64_t first = settings.seed ? *settings.seed : std::random_device{}();
    std::vector<std::uint64_t> seeds(count);
    for (std::size_t i = 0; i < count; ++i) seeds[i] = first + i;  // mod 2⁶⁴, as unsigned numbers are
    return seeds;
}

Request make_request(const Manifest& manifest, const std::vector<Class>& classes, const Settings& settings) {
    const Sampling& own = manifest.sampling;
    Request request;
    request.steps = schedule(manifest.model.length(), settings.steps.value_or(own.steps), settings.guidance.value_or(own.cfg_scale),
                             settings.mask_temperature.value_or(own.mask_temp), settings.sampling_temperature.value_or(own.samp_temp));
    if (settings.num < 1) throw InputError("expected 1 or more images a class, got " + std::to_string(settings.num));
    if (settings.batch_size < 1) throw InputError("expected a batch size of 1 or more, got " + std::to_string(settings.batch_size));
    if (classes.empty()) throw InputError("expected at least one class");
    if (static_cast<std::size_t>(settings.num) > largest_request / classes.size()) {
        throw InputError(std::to_string(classes.size()) + " classes of " + std::to_string(settings.num) +
                         " pictures are too many for one request; expected at most " + std::to_string(largest_request));
    }
    for (const Class& wanted : classes) {
        request.labels.insert(request.labels.end(), static_cast<std::size_t>(settings.num), class_index(manifest.model, wanted));
    }
    request.seeds = image_seeds(settings, request.labels.size());
    request.batch_size = static_cast<std::size_t>(settings.batch_size);
    return request;
}

/// Pictures of tokens. Throws enat's errors alone.
Images decoded(const Graphs& graphs, const Model& model, const std::vector<std::int64_t>& tokens) {
    try {
        return enat::decode(graphs, model, tokens);
    } catch (const Ort::Exception& error) {  // of tensors that are made for the graphs
        throw BackendError(first_line(error.what()));
    }
}

using Use = std::function<void(const std::vector<std::int64_t>&)>;

/// What a callback sees of one batch.
class BatchPreview final : public Preview {
public:
    BatchPreview(const Manifest& manifest, const Graphs& graphs, const std::vector<std::int64_t>& tokens,
                 const std::vector<std::uint8_t>& masked)
        : manifest_(manifest), graphs_(graphs), tokens_(tokens), masked_(masked) {}

    Images images() const override {
        manifest_.require_images();
        return decoded(graphs_, manifest_.model, tokens_);
    }
    std::vector<std::uint8_t> masked() const override { return masked_; }

private:
    const Manifest& manifest_;
    const Graphs& graphs_;
    const std::vector<std::int64_t>& tokens_;
    const std::vector<std::uint8_t>& masked_;
};

/// Adds the pictures of another batch.
void append(Images& all, Images&& batch) {
    if (all.count == 0) {
        all = std::move(batch);
        return;
    }
    if (batch.height != all.height || batch.width != all.width) {
        throw EngineError("image_decoder.onnx: its pictures have several sizes, expected " + std::to_string(all.height) + "×" +
                          std::to_string(all.width));
    }
    all.pixels.insert(all.pixels.end(), batch.pixels.begin(), batch.pixels.end());
    all.tokens.values.insert(all.tokens.values.end(), batch.tokens.values.begin(), batch.tokens.values.end());
    all.count += batch.count;
    all.tokens.count = all.count;
}

}  // namespace

struct Pipeline::Loaded {
    /// An engine that is replaced meanwhile is read again.
    static std::unique_ptr<Loaded> open(const std::filesystem::path& engine, const Options& options);

    Loaded(const std::filesystem::path& engine, const Options& options)
        : slots(options.slots),
          manifest(read_manifest(engine, options.verify)),
          graphs(manifest, options),
          at_once(pictures_at_once(manifest.model, options)),
          most(most_pictures(options)) {
        manifest.require_unchanged();
    }

    /// How many of a batch are run together.
    std::size_t together(std::size_t batch) const { return std::min(batch, most.value_or(batch)); }

    /// Draws batch by batch, or without a callback, which sees whole batches, in smaller ones where these are better; `use` is given the
    /// tokens [batch, length] of each while its slot is held.
    void draw(const Request& request, const Callback& callback, const Use& use);

    Slots slots;
    Manifest manifest;
    Graphs graphs;
    std::optional<std::size_t> at_once;  // pictures that are drawn together, whatever the batch: all of it without a number
    std::optional<std::size_t> most;     // and that can be
};

std::unique_ptr<Pipeline::Loaded> Pipeline::Loaded::open(const std::filesystem::path& engine, const Options& options) {
    constexpr int readings = 3;
    for (int reading = 1;; ++reading) {
        const Stamp before = stamp_of(engine / "manifest.json");
        try {
            return std::make_unique<Loaded>(engine, options);
        } catch (const Error&) {
            if (reading == readings || stamp_of(engine / "manifest.json") == before) throw;
        } catch (const Ort::Exception& error) {
            throw BackendError(first_line(error.what()));
        }
    }
}

void Pipeline::Loaded::draw(const Request& request, const Callback& callback, const Use& use) {
    const std::size_t count = request.labels.size(), steps = request.steps.size();
    const std::size_t asked = together(request.batch_size), batch = callback ? asked : std::min(asked, at_once.value_or(asked));
    const std::size_t total = ((count - 1) / batch + 1) * steps;
    std::size_t done = 0;  // steps of the batches before
    for (std::size_t first = 0; first < count; first += batch, done += steps) {
        const auto last = static_cast<std::ptrdiff_t>(std::min(first + batch, count));
        const auto start = static_cast<std::ptrdiff_t>(first);
        OnStep on_step;
        std::exception_ptr theirs;  // what the callback threw
        if (callback) {
            on_step = [&](const Step& step, const std::vector<std::int64_t>& tokens, const std::vector<std::uint8_t>& masked) {
                const std::size_t number = done + static_cast<std::size_t>(step.index);
                bool stop = false;
                try {
                    stop = callback(number, total, BatchPreview(manifest, graphs, tokens, masked));
                } catch (...) {
                    theirs = std::current_exception();
                    throw;
                }
                if (stop) throw Stopped("stopped after step " + std::to_string(number + 1) + " of " + std::to_string(total));
            };
        }
        const Slots::Place place = slots.take();  // for this batch alone: who waits for the next one may use the pipeline meanwhile
        try {
            use(sample(graphs, manifest.model, {request.labels.begin() + start, request.labels.begin() + last},
                       {request.seeds.begin() + start, request.seeds.begin() + last}, request.steps, on_step));
        } catch (const Ort::Exception& error) {  // of tensors that are made for the graphs
            if (theirs) std::rethrow_exception(theirs);
            throw BackendError(first_line(error.what()));
        }
    }
}

Pipeline::Pipeline(const std::filesystem::path& engine, const Options& options) : loaded_(Loaded::open(engine, options)) {}

Pipeline::Pipeline(Pipeline&&) noexcept = default;
Pipeline& Pipeline::operator=(Pipeline&&) noexcept = default;
Pipeline::~Pipeline() = default;

Images Pipeline::generate(const std::vector<Class>& classes, const Settings& settings) const {
    const Manifest& manifest = loaded_->manifest;
    manifest.require_images();
    const Request request = make_request(manifest, classes, settings);
    Images images;
    loaded_->draw(request, settings.callback, [&](const std::vector<std::int64_t>& tokens) {
        append(images, decoded(loaded_->graphs, loaded_->manifest.model, tokens));
    });
    images.tokens.seeds = request.seeds;
    return images;
}

Tokens Pipeline::generate_tokens(const std::vector<Class>& classes, const Settings& settings) const {
    const Manifest& manifest = loaded_->manifest;
    const Request request = make_request(manifest, classes, settings);
    Tokens all;
    all.count = request.labels.size();
    all.grid = static_cast<std::size_t>(manifest.model.grid);
    all.seeds = request.seeds;
    loaded_->draw(request, settings.callback,
                  [&](const std::vector<std::int64_t>& tokens) { all.values.insert(all.values.end(), tokens.begin(), tokens.end()); });
    return all;
}

Images Pipeline::decode(const Tokens& tokens, int batch_size) const {
    const Manifest& manifest = loaded_->manifest;
    manifest.require_images();
    const auto grid = static_cast<std::size_t>(manifest.model.grid);
    const std::size_t length = grid * grid;
    if (batch_size < 1) throw InputError("expected a batch size of 1 or more, got " + std::to_string(batch_size));
    if (tokens.count < 1 || tokens.grid != grid || tokens.values.size() % length != 0 || tokens.values.size() / length != tokens.count) {
        throw InputError("expected tokens of shape [N, " + std::to_string(grid) + ", " + std::to_string(grid) + "], got " +
                         std::to_string(tokens.values.size()) + " tokens as [" + std::to_string(tokens.count) + ", " +
                         std::to_string(tokens.grid) + ", " + std::to_string(tokens.grid) + "]");
    }
    const auto [least, most] = std::minmax_element(tokens.values.begin(), tokens.values.end());
    if (*least < 0 || *most >= manifest.model.codes) {
        throw InputError("expected tokens of 0 to " + std::to_string(manifest.model.codes - 1) + ", got " + std::to_string(*least) +
                         " to " + std::to_string(*most));
    }
    Images images;
    const std::size_t batch = loaded_->together(static_cast<std::size_t>(batch_size));
    for (std::size_t first = 0; first < tokens.count; first += batch) {
        const std::size_t last = std::min(first + batch, tokens.count);
        const auto start = tokens.values.begin();
        const Slots::Place place = loaded_->slots.take();  // for this batch alone
        append(images, decoded(loaded_->graphs, manifest.model,
                               {start + static_cast<std::ptrdiff_t>(first * length), start + static_cast<std::ptrdiff_t>(last * length)}));
    }
    images.tokens.seeds = tokens.seeds;
    return images;
}

std::int64_t Pipeline::class_index(const Class& wanted) const { return enat::class_index(model(), wanted); }
const Model& Pipeline::model() const { return loaded_->manifest.model; }
const Sampling& Pipeline::sampling() const { return loaded_->manifest.sampling; }
bool Pipeline::has_images() const { return loaded_->manifest.has("image_decoder.onnx"); }

}  // namespace enat
