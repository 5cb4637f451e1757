#include "npy.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string_view>

#include "error.h"
#include "files.h"

namespace fs = std::filesystem;

namespace {

const std::string kMagic = "\x93NUMPY";
constexpr size_t kLongestHeader = 512;  // NumPy pads its own to 128 bytes

UserError unreadable(const fs::path& path, const std::string& reason) {
  return UserError("volume " + path.string() + ": " + reason + "; it must be int16 HU as numpy.save writes them");
}

/// The text between the magic and the values; the stream is left at the first value.
std::string read_header(std::istream& stream, const fs::path& path) {
  std::string start(kMagic.size() + 2, '\0');  // magic, major and minor version
  stream.read(start.data(), static_cast<std::streamsize>(start.size()));
  const char version = start[kMagic.size()];
  if (!stream || !start.starts_with(kMagic) || version < 1 || version > 3) throw unreadable(path, "not a .npy file");
  size_t length = 0;
  for (int byte = 0; byte < (version == 1 ? 2 : 4); ++byte) {
    length |= static_cast<size_t>(static_cast<unsigned char>(stream.get())) << (8 * byte);
  }
  if (!stream || length > kLongestHeader) throw unreadable(path, "its header is damaged");
  std::string header(length, '\0');
  if (!stream.read(header.data(), static_cast<std::streamsize>(length))) throw unreadable(path, "truncated");
  return header;
}

/// The lengths in "2, 3, 4), ...".
std::vector<int64_t> parse_shape(std::string_view text, const fs::path& path) {
  std::vector<int64_t> shape;
  while (!text.starts_with(')')) {
    int32_t length = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), length);
    if (error != std::errc() || length < 1) throw unreadable(path, "its shape is damaged");
    shape.push_back(length);
    text.remove_prefix(static_cast<size_t>(end - text.data()));
    text.remove_prefix(std::min(text.find_first_not_of(", "), text.size()));
  }
  return shape;
}

std::vector<int64_t> shape_of_header(const std::string& header, const fs::path& path) {
  std::array<char, 8> type{}, fortran{};
  int length = 0;
  std::sscanf(header.c_str(), "{'descr': '%7[^']', 'fortran_order': %7[A-Za-z], 'shape': (%n", type.data(),
              fortran.data(), &length);
  if (length == 0) throw unreadable(path, "its header is damaged");
  if (std::strcmp(type.data(), "<i2") != 0) throw unreadable(path, std::string("got values of type ") + type.data());
  if (std::strcmp(fortran.data(), "False") != 0) throw unreadable(path, "got values in Fortran order");
  return parse_shape(std::string_view(header).substr(static_cast<size_t>(length)), path);
}

}  // namespace

HuArray read_npy(const fs::path& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) throw UserError("volume: got " + path.string() + "; it cannot be opened; check the path");
  HuArray array{shape_of_header(read_header(stream, path), path), {}};
  const double held = static_cast<double>(fs::file_size(path)) - static_cast<double>(stream.tellg());
  double count = 1;  // a product of absurd lengths would overflow an integer
  for (const int64_t length : array.shape) count *= static_cast<double>(length);
  if (count * sizeof(int16_t) != held) throw unreadable(path, "truncated or damaged (header and length disagree)");
  array.values.resize(static_cast<size_t>(count));
  const auto bytes = static_cast<std::streamsize>(array.values.size() * sizeof(int16_t));
  if (!stream.read(reinterpret_cast<char*>(array.values.data()), bytes)) throw unreadable(path, "cannot be read");
  return array;
}

void write_npy(const fs::path& path, const std::string& type, std::span<const int64_t> shape,
               std::span<const char> bytes) {
  std::string header = "{'descr': '" + type + "', 'fortran_order': False, 'shape': (";
  for (const int64_t length : shape) header += std::to_string(length) + ", ";
  header += "), }";
  const size_t before = kMagic.size() + 4;  // the version and the header's own length
  header.resize((before + header.size() + 1 + 63) / 64 * 64 - before - 1, ' ');
  header += '\n';
  WrittenAside file(path);
  std::ofstream stream(file.aside(), std::ios::binary);
  stream << kMagic << '\1' << '\0' << static_cast<char>(header.size() & 255) << static_cast<char>(header.size() >> 8);
  stream << header;
  stream.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  stream.close();
  if (!stream) throw unwritable(path, std::strerror(errno));
  file.publish();
}
