#pragma once
#define FAKE_API extern "C" __attribute__((visibility("default")))
