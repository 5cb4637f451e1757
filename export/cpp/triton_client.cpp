/// triton_client: asks a Triton server for the mask of some slices, over HTTP with binary tensors (KServe v2).

#include <curl/curl.h>

#include <cstdio>
#include <cstring>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>

#include "error.h"
#include "npy.h"

namespace {

using Json = nlohmann::json;
constexpr const char* kHeaderLength = "Inference-Header-Content-Length";  // of the JSON that stands before the tensors

struct Answer {
  long status = 0;
  size_t header_length = 0;  // 0: all of the body is JSON
  std::string body;
};

size_t take_body(char* bytes, size_t, size_t count, void* answer) {
  static_cast<Answer*>(answer)->body.append(bytes, count);
  return count;
}

size_t take_header(char* bytes, size_t, size_t count, void* answer) {
  const size_t name = std::strlen(kHeaderLength);
  const std::string line(bytes, count);
  if (line.size() > name && strncasecmp(line.c_str(), kHeaderLength, name) == 0) {
    static_cast<Answer*>(answer)->header_length = std::stoul(line.substr(name + 1));
  }
  return count;
}

Answer post(const std::string& url, const std::string& json, const std::string& body) {
  const std::unique_ptr<CURL, decltype(&curl_easy_cleanup)> curl(curl_easy_init(), curl_easy_cleanup);
  const std::string length = std::string(kHeaderLength) + ": " + std::to_string(json.size());
  curl_slist* words = curl_slist_append(nullptr, "Content-Type: application/octet-stream");
  words = curl_slist_append(words, length.c_str());
  const std::unique_ptr<curl_slist, decltype(&curl_slist_free_all)> headers(words, curl_slist_free_all);
  Answer answer;
  curl_easy_setopt(curl.get(), CURLOPT_URL, url.c_str());
  curl_easy_setopt(curl.get(), CURLOPT_HTTPHEADER, headers.get());
  curl_easy_setopt(curl.get(), CURLOPT_POSTFIELDS, body.data());
  curl_easy_setopt(curl.get(), CURLOPT_POSTFIELDSIZE_LARGE, static_cast<curl_off_t>(body.size()));
  curl_easy_setopt(curl.get(), CURLOPT_WRITEFUNCTION, take_body);
  curl_easy_setopt(curl.get(), CURLOPT_WRITEDATA, &answer);
  curl_easy_setopt(curl.get(), CURLOPT_HEADERFUNCTION, take_header);
  curl_easy_setopt(curl.get(), CURLOPT_HEADERDATA, &answer);
  const CURLcode code = curl_easy_perform(curl.get());
  if (code != CURLE_OK) throw UserError("server: got " + url + "; " + curl_easy_strerror(code) + "; is it running?");
  curl_easy_getinfo(curl.get(), CURLINFO_RESPONSE_CODE, &answer.status);
  return answer;
}

/// @param pixel_mm sizes of each slice's pixels, down and across, one after the other; none for models that do not take them.
Answer infer(const std::string& server, const HuArray& hu, const std::vector<float>& pixel_mm) {
  const size_t size = hu.values.size() * sizeof(int16_t);
  const size_t mm_size = pixel_mm.size() * sizeof(float);
  const Json binary = {{"binary_data", true}};
  Json inputs = {{{"name", "HU"}, {"shape", hu.shape}, {"datatype", "INT16"}, {"parameters", {{"binary_data_size", size}}}}};
  if (mm_size) {
    inputs.push_back({{"name", "PIXEL_MM"}, {"shape", {hu.shape.front(), 2}}, {"datatype", "FP32"}, {"parameters", {{"binary_data_size", mm_size}}}});
  }
  const Json request = {
      {"inputs", inputs},
      {"outputs", {{{"name", "MASK"}, {"parameters", binary}}, {{"name", "PROB"}, {"parameters", binary}}}}};
  const std::string json = request.dump();
  const std::string tensor(reinterpret_cast<const char*>(hu.values.data()), size);
  const std::string sizes(reinterpret_cast<const char*>(pixel_mm.data()), mm_size);
  const Answer answer = post(server + "/v2/models/distseg/infer", json, json + tensor + sizes);
  if (answer.status != 200) throw UserError("server: " + std::to_string(answer.status) + " " + answer.body);
  return answer;
}

/// Writes the outputs that lie one after the other behind the JSON.
void write_outputs(const Answer& answer, const std::string& mask_path, const std::string& probability_path) {
  const Json response = Json::parse(answer.body.substr(0, answer.header_length));
  size_t start = answer.header_length;
  for (const Json& output : response.at("outputs")) {
    const std::vector<int64_t> shape = output.at("shape");
    const size_t size = output.at("parameters").at("binary_data_size");
    const std::string bytes = answer.body.substr(start, size);
    start += size;
    const bool is_mask = output.at("name") == "MASK";
    write_npy(is_mask ? mask_path : probability_path, is_mask ? "|u1" : "<f4", shape, bytes);
    std::cout << output.at("name") << ' ' << output.at("datatype") << ' ' << output.at("shape") << '\n';
  }
}

/// "0.7,0.7 0.8,0.8": of each slice, or one pair for all.
std::vector<float> parse_pixel_mm(int count, char** words, size_t slices) {
  std::vector<float> mm;
  for (int i = 0; i < count; ++i) {
    float down = 0, across = 0;
    if (std::sscanf(words[i], "%f,%f", &down, &across) != 2) throw UserError(std::string("pixels: got ") + words[i] + "; must be Y,X in mm");
    mm.insert(mm.end(), {down, across});
  }
  while (count == 1 && mm.size() < 2 * slices) mm.insert(mm.end(), {mm[0], mm[1]});
  if (count && mm.size() != 2 * slices) throw UserError("pixels: got " + std::to_string(count) + " sizes; one, or one a slice, is needed");
  return mm;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 5) {
    std::cerr << "usage: triton_client http://HOST:PORT HU.npy MASK.npy PROB.npy [Y,X ...]\n"
                 "  HU.npy: int16 (N, C, H, W); Y,X: sizes of pixels in mm, one for all slices or one each, where the model takes them\n";
    return 2;
  }
  try {
    const HuArray hu = read_npy(argv[2]);
    write_outputs(infer(argv[1], hu, parse_pixel_mm(argc - 5, argv + 5, hu.shape.front())), argv[3], argv[4]);
    return 0;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
  }
}
