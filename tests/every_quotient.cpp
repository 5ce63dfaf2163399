// Prints for how many numbers AmaxByInverse of cpu.cpp gives another quotient than a division does: of every mantissa, at
// both ends of what it is used for and between.
#include <cmath>
#include <cstdio>
#include <initializer_list>

#include "../csrc/cpu.cpp"

int main() {
  using namespace fos::FOS_ISA;
  long different = 0;
  for (const float encoded_amax : {1536.0f, 2688.0f}) {
    // From 2^-10 * 2^-80, the smallest product that is not 0, to 2688 * 2^100.
    for (const int exponent : {-90, -80, -1, 0, 1, 64, 111}) {
      for (uint32_t mantissa = 0; mantissa < 1u << 23; ++mantissa) {
        const float number = std::ldexp(fos::bits<float>(127u << 23 | mantissa), exponent);
        different += over_encoded_amax(AmaxByInverse{}, number, encoded_amax) != number / encoded_amax;
      }
    }
    different += over_encoded_amax(AmaxByInverse{}, 0.0f, encoded_amax) != 0.0f;
  }
  std::printf("%ld\n", different);
}
