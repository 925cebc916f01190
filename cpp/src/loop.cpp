#include "loop.hpp"

#include <string>
#include <utility>

#include "noise.hpp"

namespace enat {

namespace {

/// 0 … length−1 for every image: [batch, length].
Ort::Value all_positions(std::int64_t batch, std::int64_t length) {
    std::vector<std::int64_t> positions(static_cast<std::size_t>(batch * length));
    for (std::size_t i = 0; i < positions.size(); ++i) positions[i] = static_cast<std::int64_t>(i) % length;
    return tensor({batch, length}, positions);
}

/// Throws EngineError unless the sampler gave what it may give.
std::int64_t within(std::int64_t found, std::int64_t count, const char* kind) {
    if (found >= 0 && found < count) return found;
    throw EngineError(std::string("sampler.onnx: it gave the ") + kind + " " + std::to_string(found) + ", expected 0 to " +
                      std::to_string(count - 1));
}

/// Sets row by row target[positions[i]] = value(i), for `count` positions a row of `length`.
template <typename T, typename Value>
void scatter(std::vector<T>& target, std::int64_t length, const std::int64_t* positions, std::int64_t count, Value value) {
    const std::int64_t batch = static_cast<std::int64_t>(target.size()) / length;
    for (std::int64_t i = 0; i < batch * count; ++i) {
        target[static_cast<std::size_t>(i / count * length + within(positions[i], length, "position"))] = value(i);
    }
}

}  // namespace

std::vector<std::int64_t> sample(const Graphs& graphs, const Model& model, const std::vector<std::int64_t>& labels,
                                 const std::vector<std::uint64_t>& seeds, const std::vector<Step>& steps, const OnStep& on_step) {
    const auto batch = static_cast<std::int64_t>(labels.size());
    const std::int64_t length = model.length();
    bool guided = false;
    for (const Step& step : steps) guided = guided || step.guidance > 0;
    const std::int64_t rows = guided ? 2 * batch : batch;

    std::vector<std::int64_t> network_labels = labels;
    network_labels.resize(static_cast<std::size_t>(rows), model.num_classes);  // the unconditional rows: the null label
    const Ort::Value label_tensor = tensor({rows}, network_labels);
    std::vector<Ort::Value> modulation = graphs.run(Graph::condition, {&label_tensor});
    for (std::size_t output = 0; output < modulation.size(); ++output) {
        Shape shape = modulation[output].GetTensorTypeAndShapeInfo().GetShape();  // opaque beyond the first axis
        if (shape.empty()) shape.push_back(0);
        shape[0] = rows;
        graphs.check(Graph::condition, output, modulation[output], shape);
    }
    Ort::Value &encoder_modulation = modulation[0], &decoder_modulation = modulation[1];
    // Step 0 has no guidance and nothing is visible: it needs no unconditional rows.
    const Ort::Value first_modulation = first_rows(decoder_modulation, batch);
    Ort::Value features = empty_tensor({batch, 0, model.dim}, graphs.float_type());
    Ort::Value positions = all_positions(batch, length);       // of the masked tokens, [batch, masked]
    Ort::Value step_tokens{nullptr}, step_positions{nullptr};  // revealed by the step before, [batch, new]
    std::vector<std::int64_t> tokens(static_cast<std::size_t>(batch * length));

    for (const Step& step : steps) {
        if (step.index > 0) {
            if (step.index == 1) features = empty_tensor({rows, 0, model.dim}, graphs.float_type());
            features = std::move(graphs.run(Graph::encoder, {&step_tokens, &step_positions, &features, &encoder_modulation})[0]);
            graphs.check(Graph::encoder, 0, features, {rows, length - step.masked, model.dim});
        }
        const Ort::Value& step_modulation = step.index == 0 ? first_modulation : decoder_modulation;
        const std::vector<Ort::Value> logits = graphs.run(Graph::decoder, {&positions, &features, &step_modulation});
        graphs.check(Graph::decoder, 0, logits[0], {step.index == 0 ? batch : rows, step.masked, model.codes});

        const Noise noise = step_noise(seeds, step.index, length);
        const Ort::Value choice_noise = tensor({batch, length}, noise.choice), confidence_noise = tensor({batch, length}, noise.confidence);
        const Ort::Value guidance = scalar(static_cast<float>(step.guidance));
        const Ort::Value sampling_temperature = scalar(static_cast<float>(step.sampling_temperature));
        const Ort::Value mask_temperature = scalar(static_cast<float>(step.mask_temperature));
        const Ort::Value keep = scalar(step.keep);
        std::vector<Ort::Value> chosen = graphs.run(Graph::sampler, {&logits[0], &positions, &choice_noise, &confidence_noise, &guidance,
                                                                     &sampling_temperature, &mask_temperature, &keep});
        const std::int64_t revealed = step.masked - step.keep;
        const auto* new_tokens = graphs.values<std::int64_t>(Graph::sampler, 1, chosen[1], {batch, revealed});
        const auto* new_positions = graphs.values<std::int64_t>(Graph::sampler, 2, chosen[2], {batch, revealed});
        const auto* still_masked = graphs.values<std::int64_t>(Graph::sampler, 3, chosen[3], {batch, step.keep});
        const auto* choice = graphs.values<std::int64_t>(Graph::sampler, 0, chosen[0], {batch, step.masked});
        scatter(tokens, length, new_positions, revealed, [&](std::int64_t i) { return within(new_tokens[i], model.codes, "token"); });
        if (on_step) {
            // The step's choice for all that was masked, over what is revealed.
            std::vector<std::int64_t> all_tokens = tokens;
            scatter(all_tokens, length, positions.GetTensorData<std::int64_t>(), step.masked,
                    [&](std::int64_t i) { return within(choice[i], model.codes, "token"); });
            std::vector<std::uint8_t> masked(tokens.size());
            scatter(masked, length, still_masked, step.keep, [](std::int64_t) { return std::uint8_t{1}; });
            on_step(step, all_tokens, masked);
        }
        step_tokens = std::move(chosen[1]);
        step_positions = std::move(chosen[2]);
        positions = std::move(chosen[3]);
    }
    return tokens;
}

Images decode(const Graphs& graphs, const Model& model, const std::vector<std::int64_t>& tokens) {
    const std::int64_t length = model.length(), count = static_cast<std::int64_t>(tokens.size()) / length;
    // On the CPU one by one, whatever the batch: a picture's features fill the caches.
    const std::int64_t at_once = graphs.on_cpu() ? 1 : count;
    Images images;
    for (std::int64_t first = 0; first < count; first += at_once) {
        const std::vector<std::int64_t> own(tokens.begin() + first * length, tokens.begin() + (first + at_once) * length);
        const Ort::Value token_tensor = tensor({at_once, length}, own), positions = all_positions(at_once, length);
        const std::vector<Ort::Value> outputs = graphs.run(Graph::image_decoder, {&token_tensor, &positions});
        const bool known = images.height > 0;
        const std::int64_t height = known ? static_cast<std::int64_t>(images.height) : -1;
        const std::int64_t width = known ? static_cast<std::int64_t>(images.width) : -1;
        const auto* pixels = graphs.values<std::uint8_t>(Graph::image_decoder, 0, outputs[0], {at_once, height, width, 3});
        const Shape shape = outputs[0].GetTensorTypeAndShapeInfo().GetShape();
        images.height = static_cast<std::size_t>(shape[1]);
        images.width = static_cast<std::size_t>(shape[2]);
        images.pixels.insert(images.pixels.end(), pixels, pixels + at_once * shape[1] * shape[2] * 3);
    }
    images.count = static_cast<std::size_t>(count);
    images.tokens.count = images.count;
    images.tokens.grid = static_cast<std::size_t>(model.grid);
    images.tokens.values = tokens;
    return images;
}

}  // namespace enat
