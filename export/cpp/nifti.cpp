#include "nifti.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <sstream>
#include <string>

#include "error.h"
#include "files.h"

namespace fs = std::filesystem;

namespace {

constexpr double kMaxVoxels = 2147483648.0;  // far above any chest CT, far below what a broken header may claim
constexpr double kDeflateRatio = 1032;       // no gzip file unpacks to more than this many times its size
constexpr double kLeastVolume = 1e-9;        // mm^3 of a voxel
constexpr double kRightAngled = 0.999;       // of the product of its sides: the least volume of a voxel
constexpr std::array<char, 4> kNoExtensions{};  // between header and voxels
constexpr std::array<unsigned char, 2> kGzipMagic = {0x1f, 0x8b};
constexpr int kBothByteOrders = 3;           // the sum of niftilib's own two constants
constexpr std::array kVoxelMm = {1e-6, 1e6};
constexpr int kLeastExtension = 16, kExtensionHeader = 8;  // bytes
constexpr int kLastCode = 5;                 // of qform and sform

std::string lower_case(std::string text) {
  std::ranges::transform(text, text.begin(), [](unsigned char letter) { return std::tolower(letter); });
  return text;
}

UserError bad_volume(const fs::path& path, const std::string& reason) {
  return UserError("volume " + path.string() + ": " + reason);
}

UserError damaged(const fs::path& path, const std::string& reason) {
  return bad_volume(path, "truncated or damaged (" + reason + "); copy or download it again");
}

nifti_dmat44 affine(const nifti_image& header) {
  if (header.sform_code > 0) return header.sto_xyz;
  nifti_dmat44 affine = header.qto_xyz;
  if (header.qform_code <= 0) affine.m[0][0] *= -1;  // the file has neither: x grows to the Left, as nibabel has it
  return affine;
}

std::array<double, 3> voxel_mm(const nifti_dmat44& affine) {
  std::array<double, 3> sizes;
  for (int axis = 0; axis < 3; ++axis) {
    sizes[axis] = std::hypot(affine.m[0][axis], affine.m[1][axis], affine.m[2][axis]);
  }
  return sizes;
}

bool is_compressed(const fs::path& path) {
  return lower_case(path.filename().string()).ends_with(".gz");
}

double determinant(const nifti_dmat44& a) {
  return a.m[0][0] * (a.m[1][1] * a.m[2][2] - a.m[1][2] * a.m[2][1]) -
         a.m[0][1] * (a.m[1][0] * a.m[2][2] - a.m[1][2] * a.m[2][0]) +
         a.m[0][2] * (a.m[1][0] * a.m[2][1] - a.m[1][1] * a.m[2][0]);
}

/// Whether the transform in use is one; niftilib would take 0 for what is not finite, and a unit quaternion for a longer one.
template <typename Header>
bool is_placed(const Header& h) {
  double zero = 0;
  if (h.sform_code > 0) {
    for (int i = 0; i < 4; ++i) zero += 0 * (h.srow_x[i] + h.srow_y[i] + h.srow_z[i]);
  } else if (h.qform_code > 0) {
    zero += 0 * (h.qoffset_x + h.qoffset_y + h.qoffset_z);
    const long double b = h.quatern_b, c = h.quatern_c, d = h.quatern_d;
    const bool is_unit = b * b + c * c + d * d - 1 < 3 * std::numeric_limits<decltype(h.quatern_b)>::epsilon();
    return zero == 0 && is_unit;
  }
  return zero == 0;
}

/// Refuses what niftilib would mend without a word, and nibabel in another way.
template <typename Header>
void check_stored(const Header& h, const fs::path& path) {
  if (h.magic[1] != '+') throw bad_volume(path, "got a header without voxels; both must be one file; convert it");
  const double offset = static_cast<double>(h.vox_offset), least_offset = sizeof(Header) + kNoExtensions.size();
  if (!(offset >= least_offset && offset <= kMaxVoxels)) {  // NaN is not above it either
    throw damaged(path, "its voxels cannot begin at vox_offset " + std::to_string(h.vox_offset));
  }
  const int unit = h.xyzt_units & 7;
  if (unit == NIFTI_UNITS_METER || unit == NIFTI_UNITS_MICRON) {
    throw bad_volume(path, std::string("got voxel sizes in ") + (unit == NIFTI_UNITS_METER ? "metres" : "micrometres") +
                               "; CT's are in mm; mend the header (xyzt_units)");
  }
  if (h.scl_slope != 0 && std::isfinite(h.scl_slope) && !std::isfinite(h.scl_inter)) {
    throw damaged(path, "its slope has no intercept");
  }
  for (const int code : {h.qform_code, h.sform_code}) {
    if (code < 0 || code > kLastCode) {
      throw bad_volume(path, "got qform_code or sform_code " + std::to_string(code) + "; it must be 0 to 5; mend the header");
    }
  }
  bool is_good = !(h.pixdim[0] < 0 && h.pixdim[0] != -1);
  std::ostringstream got;
  got << h.pixdim[0];
  for (int axis = 1; axis <= 3; ++axis) {
    is_good = is_good && std::isfinite(h.pixdim[axis]) && h.pixdim[axis] != 0;
    got << ' ' << h.pixdim[axis];
  }
  if (!is_good) {
    throw bad_volume(path, "got pixdim " + got.str() + "; its first number must be 1 or -1, the sizes of voxels finite and not 0; mend the header");
  }
}

/// What nibabel mends in the headers that pass: a sign that is not set, sizes below 0.
template <typename Header>
void mend_sizes(Header& h) {
  if (h.pixdim[0] != -1) h.pixdim[0] = 1;
  for (int axis = 1; axis <= 3; ++axis) h.pixdim[axis] = std::fabs(h.pixdim[axis]);
}

at::ScalarType voxel_type(int datatype, const fs::path& path) {
  switch (datatype) {
    case DT_UINT8: return at::kByte;
    case DT_INT8: return at::kChar;
    case DT_UINT16: return at::kUInt16;
    case DT_INT16: return at::kShort;
    case DT_UINT32: return at::kUInt32;
    case DT_INT32: return at::kInt;
    case DT_UINT64: return at::kUInt64;
    case DT_INT64: return at::kLong;
    case DT_FLOAT32: return at::kFloat;
    case DT_FLOAT64: return at::kDouble;
    default:
      throw bad_volume(path, std::string("got voxels of type ") + nifti_datatype_to_string(datatype) +
                                 "; they must be real numbers of up to 64 bits; convert it");
  }
}

/// The header as niftilib reads it, which gets to see only one that looks good: it mends or prints what does not.
template <typename Header>
NiftiHeader parse_header(Header stored, nifti_image* (*parse)(Header, const char*), int (*looks_good)(const Header*),
                         int version, const fs::path& path) {
  const bool swapped = stored.sizeof_hdr != static_cast<int>(sizeof(Header));
  if (swapped) swap_nifti_header(&stored, version);
  if (!looks_good(&stored)) throw damaged(path, "its header is not one of NIfTI");
  check_stored(stored, path);
  mend_sizes(stored);
  if (!is_placed(stored)) throw bad_volume(path, "got an affine that is not finite, or a quaternion longer than 1; mend the header");
  voxel_type(stored.datatype, path);  // refuses what it does not know
  const std::shared_ptr<nifti_image> parsed(parse(stored, path.c_str()), nifti_image_free);
  if (!parsed) throw damaged(path, "its header is not one of NIfTI");
  if (swapped) parsed->byteorder = kBothByteOrders - parsed->byteorder;
  return {stored, parsed};
}

template <typename Header>
Header as_header(const std::array<char, sizeof(nifti_2_header)>& bytes) {
  Header header;
  std::memcpy(&header, bytes.data(), sizeof(header));
  return header;
}

/// The file's first bytes; of one that is called .gz and is not, or the other way round, none.
std::array<char, sizeof(nifti_2_header)> first_bytes(const fs::path& path) {
  std::array<char, sizeof(nifti_2_header)> bytes{};
  std::array<unsigned char, 2> magic{};
  std::ifstream(path, std::ios::binary).read(reinterpret_cast<char*>(magic.data()), magic.size());
  if (is_compressed(path) && magic != kGzipMagic) throw damaged(path, "it is called .gz and is none");
  znzFile file = znzopen(path.c_str(), "rb", is_compressed(path));
  if (!file) throw damaged(path, "it cannot be opened");
  znzread(bytes.data(), 1, bytes.size(), file);
  Xznzclose(&file);
  return bytes;
}

NiftiHeader read_header(const fs::path& path) {
  const auto bytes = first_bytes(path);
  switch (const int version = nifti_header_version(bytes.data(), bytes.size())) {
    case 1:
      return parse_header(as_header<nifti_1_header>(bytes), nifti_convert_n1hdr2nim, nifti_hdr1_looks_good, version, path);
    case 2:
      return parse_header(as_header<nifti_2_header>(bytes), nifti_convert_n2hdr2nim, nifti_hdr2_looks_good, version, path);
    default:
      throw damaged(path, "it has no header of NIfTI");
  }
}

/// Refuses what a header claims before memory is asked for.
void check_claims(const nifti_image& header, const fs::path& path) {
  std::string shape = std::to_string(header.dim[1]);
  for (int axis = 2; axis <= std::min<int64_t>(header.ndim, 7); ++axis) shape += " x " + std::to_string(header.dim[axis]);
  shape += " voxels in " + std::to_string(header.ndim) + " dimensions";
  const bool is_one = header.ndim >= 3 && std::all_of(header.dim + 4, header.dim + std::max<int64_t>(header.ndim, 3) + 1,
                                                      [](int64_t length) { return length == 1; });
  if (!is_one) throw bad_volume(path, "got " + shape + "; it must have three; take one volume out of it");
  if (1.0 * header.nx * header.ny * header.nz > kMaxVoxels) {
    throw bad_volume(path, "got " + shape + "; it must have at most 2^31; the header may be broken");
  }
  const double claimed = 1.0 * header.iname_offset + 1.0 * header.nvox * header.nbyper;
  const double size = static_cast<double>(fs::file_size(path));
  if (claimed > size * (is_compressed(path) ? kDeflateRatio : 1)) {
    throw damaged(path, "its header claims " + shape + ", more than the file can hold");
  }
}

void check_affine(const nifti_image& header, const fs::path& path) {
  const nifti_dmat44 to_mm = affine(header);
  const auto sides = voxel_mm(to_mm);
  const auto [least, most] = std::ranges::minmax(sides);
  if (least < kVoxelMm.front() || most > kVoxelMm.back() || std::fabs(determinant(to_mm)) < kLeastVolume) {
    throw bad_volume(path, "got voxels of " + std::to_string(least) + " to " + std::to_string(most) +
                               " mm, or axes that do not span space; mend the header");
  }
  const double share = std::fabs(determinant(to_mm)) / (sides[0] * sides[1] * sides[2]);
  if (share < kRightAngled) {
    throw bad_volume(path, "got axes that are not at right angles (a gantry tilt; a voxel has " + std::to_string(100 * share) +
                               " % of the volume that its sides say); resample it to a straight grid");
  }
}

/// Whether the extensions that the header announces lie between it and the voxels.
bool has_whole_extensions(znzFile file, const NiftiHeader& header) {
  int64_t place = std::visit([](const auto& stored) { return static_cast<int64_t>(sizeof(stored)); }, header.stored);
  std::array<char, kNoExtensions.size()> announced{};
  znzseek(file, place, SEEK_SET);
  if (znzread(announced.data(), 1, announced.size(), file) != announced.size() || announced[0] == 0) return true;
  place += static_cast<int64_t>(announced.size());
  for (int32_t length = 0; header.parsed->iname_offset - place >= kLeastExtension; place += length) {
    znzseek(file, place, SEEK_SET);
    if (znzread(&length, 1, sizeof(length), file) != sizeof(length)) return false;
    if (header.parsed->byteorder != nifti_short_order()) nifti_swap_4bytes(1, &length);
    if (length < kExtensionHeader || length > header.parsed->iname_offset - place) return false;
  }
  return true;
}

/// Fills the tensor and reads on to the end of the file, where gzip compares its checksum.
void read_voxels(const NiftiHeader& header, const fs::path& path, at::Tensor& stored_KJI) {
  znzFile file = znzopen(path.c_str(), "rb", is_compressed(path));
  if (!file) throw damaged(path, "it cannot be opened");
  const bool is_followed = has_whole_extensions(file, header);
  znzseek(file, header.parsed->iname_offset, SEEK_SET);
  const size_t wanted = stored_KJI.nbytes();
  const size_t got = znzread(stored_KJI.data_ptr(), 1, wanted, file);
  std::array<char, 65536> rest;
  size_t more = got;
  while (more == wanted || more == rest.size()) more = znzread(rest.data(), 1, rest.size(), file);
  const bool whole = Xznzclose(&file) == 0 && more <= rest.size();
  if (!is_followed) throw damaged(path, "an extension of its header is not whole");
  if (got != wanted || !whole) throw damaged(path, "its voxels are not all there");
}

/// As nibabel scales: in 64 bits, and not at all with a slope of 0 or with the identity.
at::Tensor scaled(const at::Tensor& stored, const nifti_image& header) {
  if (header.scl_slope != 0 && (header.scl_slope != 1 || header.scl_inter != 0)) {
    return stored.to(at::kDouble).mul_(header.scl_slope).add_(header.scl_inter);
  }
  const bool is_wide_unsigned = at::isBarebonesUnsignedType(stored.scalar_type());  // torch cannot calculate with it
  return is_wide_unsigned ? stored.to(at::kDouble) : stored;
}

/// A new header with the shape and all that places the voxels.
template <typename Header>
Header mask_header(const Header& like) {
  Header header{};
  header.sizeof_hdr = sizeof(Header);
  header.datatype = DT_UINT8;
  header.bitpix = 8;
  header.vox_offset = sizeof(Header) + kNoExtensions.size();
  header.scl_slope = 1;
  header.xyzt_units = like.xyzt_units;
  header.qform_code = like.qform_code;
  header.sform_code = like.sform_code;
  header.quatern_b = like.quatern_b;
  header.quatern_c = like.quatern_c;
  header.quatern_d = like.quatern_d;
  header.qoffset_x = like.qoffset_x;
  header.qoffset_y = like.qoffset_y;
  header.qoffset_z = like.qoffset_z;
  std::ranges::fill(header.dim, 1);
  std::copy_n(like.dim, 4, header.dim);
  header.dim[0] = 3;  // further axes are of length 1
  std::ranges::fill(header.pixdim, 1);
  std::copy_n(like.pixdim, 4, header.pixdim);
  std::ranges::copy(like.srow_x, header.srow_x);
  std::ranges::copy(like.srow_y, header.srow_y);
  std::ranges::copy(like.srow_z, header.srow_z);
  std::ranges::copy(like.magic, header.magic);
  return header;
}

template <typename Header>
bool write_file(const fs::path& path, const Header& header, const at::Tensor& mask_KJI) {
  znzFile file = znzopen(path.c_str(), "wb", is_compressed(path));
  if (!file) return false;
  bool whole = znzwrite(&header, 1, sizeof(header), file) == sizeof(header);
  whole = whole && znzwrite(kNoExtensions.data(), 1, kNoExtensions.size(), file) == kNoExtensions.size();
  whole = whole && znzwrite(mask_KJI.data_ptr(), 1, mask_KJI.nbytes(), file) == mask_KJI.nbytes();
  return Xznzclose(&file) == 0 && whole;
}

}  // namespace

at::Tensor AxisOrder::to_ZYX(const at::Tensor& values_KJI) const {
  return values_KJI.permute(source).flip(reversed).contiguous();
}

at::Tensor AxisOrder::to_KJI(const at::Tensor& values_ZYX) const {
  at::DimVector back(3);
  for (int axis = 0; axis < 3; ++axis) back[source[axis]] = axis;
  return values_ZYX.flip(reversed).permute(back).contiguous();
}

bool is_nifti(const fs::path& path) {
  const std::string name = lower_case(path.filename().string());
  return name.ends_with(".nii") || name.ends_with(".nii.gz");
}

NiftiVolume read_nifti(const fs::path& path) {
  nifti_set_debug_level(0);  // what is wrong is said once, by us
  if (!fs::is_regular_file(path)) throw UserError("volume: got " + path.string() + "; no such file; check the path");
  const NiftiHeader header = read_header(path);
  const nifti_image& parsed = *header.parsed;
  check_claims(parsed, path);
  check_affine(parsed, path);
  at::Tensor stored_KJI = at::empty({parsed.nz, parsed.ny, parsed.nx}, voxel_type(parsed.datatype, path));
  read_voxels(header, path, stored_KJI);
  if (parsed.byteorder != nifti_short_order() && parsed.swapsize > 1) {
    nifti_swap_Nbytes(stored_KJI.numel(), parsed.swapsize, stored_KJI.data_ptr());
  }
  return {header, scaled(stored_KJI, parsed)};
}

void write_nifti(const fs::path& path, const at::Tensor& mask_KJI, const NiftiHeader& like) {
  WrittenAside file(path);
  const auto write = [&](const auto& header) { return write_file(file.aside(), mask_header(header), mask_KJI); };
  if (!std::visit(write, like.stored)) throw unwritable(path, std::strerror(errno));
  file.publish();
}

AxisOrder axis_order(const NiftiHeader& header) {
  std::array<int, 3> codes{};  // of I, J and K: NIFTI_L2R = 1, R2L, P2A, A2P, I2S, S2I
  nifti_dmat44_to_orientation(affine(*header.parsed), &codes[0], &codes[1], &codes[2]);
  AxisOrder order{at::DimVector(3), {}};
  for (int axis = 0; axis < 3; ++axis) {
    const int wanted = 2 - (codes[axis] - 1) / 2;  // of Z, Y, X
    order.source[wanted] = 2 - axis;
    if (codes[axis] == NIFTI_L2R || codes[axis] == NIFTI_P2A || codes[axis] == NIFTI_S2I) {
      order.reversed.push_back(wanted);
    }
  }
  return order;
}

std::array<double, 2> pixel_mm(const NiftiHeader& header) {
  const auto sides = voxel_mm(affine(*header.parsed));
  const AxisOrder order = axis_order(header);
  const auto rounded = [&](int of_ZYX) { return std::round(sides[2 - order.source[of_ZYX]] * 1e6) / 1e6; };
  return {rounded(1), rounded(2)};
}

double voxel_ml(const NiftiHeader& header) {
  const auto [x, y, z] = voxel_mm(affine(*header.parsed));
  return x * y * z / 1000;
}
