#include "net/aes_gcm.h"

#include <openssl/evp.h>

#include <cstring>
#include <new>

namespace infemeral {
namespace {

constexpr std::size_t kTagSize = 16;

const unsigned char* raw(std::span<const std::byte> bytes) {
  return reinterpret_cast<const unsigned char*>(bytes.data());
}

}  // namespace

void AesGcm::Free::operator()(evp_cipher_ctx_st* context) const {
  EVP_CIPHER_CTX_free(context);  // wipes it
}

AesGcm::AesGcm(const SecretBytes<32>& key) : context_(EVP_CIPHER_CTX_new()) {
  // Both directions of GCM use the same expanded key.
  if (context_ == nullptr ||
      EVP_EncryptInit_ex(context_.get(), EVP_aes_256_gcm(), nullptr, key.data(), nullptr) != 1) {
    throw std::bad_alloc();
  }
}

bool AesGcm::encrypt(const Nonce& nonce, Bytes associated, Bytes plaintext,
                     unsigned char* out) const {
  EVP_CIPHER_CTX* context = context_.get();
  int size = 0;
  if (context == nullptr ||
      EVP_EncryptInit_ex(context, nullptr, nullptr, nullptr, nonce.data()) != 1) {
    return false;
  }
  if (!associated.empty() && EVP_EncryptUpdate(context, nullptr, &size, raw(associated),
                                               static_cast<int>(associated.size())) != 1) {
    return false;
  }
  if (!plaintext.empty() && EVP_EncryptUpdate(context, out, &size, raw(plaintext),
                                              static_cast<int>(plaintext.size())) != 1) {
    return false;
  }
  unsigned char* tag = out + plaintext.size();
  return EVP_EncryptFinal_ex(context, tag, &size) == 1 &&
         EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_AEAD_GET_TAG, kTagSize, tag) == 1;
}

bool AesGcm::decrypt(const Nonce& nonce, Bytes associated, Bytes message,
                     unsigned char* out) const {
  EVP_CIPHER_CTX* context = context_.get();
  int size = 0;
  if (context == nullptr || message.size() < kTagSize ||
      EVP_DecryptInit_ex(context, nullptr, nullptr, nullptr, nonce.data()) != 1) {
    return false;
  }
  std::array<unsigned char, kTagSize> tag;
  const Bytes ciphertext = message.first(message.size() - kTagSize);
  std::memcpy(tag.data(), message.data() + ciphertext.size(), kTagSize);
  if (EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_AEAD_SET_TAG, kTagSize, tag.data()) != 1) return false;
  if (!associated.empty() && EVP_DecryptUpdate(context, nullptr, &size, raw(associated),
                                               static_cast<int>(associated.size())) != 1) {
    return false;
  }
  if (!ciphertext.empty() && EVP_DecryptUpdate(context, out, &size, raw(ciphertext),
                                               static_cast<int>(ciphertext.size())) != 1) {
    return false;
  }
  unsigned char unused = 0;
  return EVP_DecryptFinal_ex(context, &unused, &size) == 1;
}

}  // namespace infemeral
