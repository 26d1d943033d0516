/* The native half of Classifier.java: the C interface of a bundle (tlr.h) as functions of Java.
 *
 * A model is a long there, 0 when it is closed. What a function returns after it has thrown is not looked at.
 */
#include <jni.h>
#include <stdint.h>
#include <stdio.h>

#include "tlr.h"

#define FUNCTION(name) JNICALL Java_org_tvmlowrank_example_Classifier_##name

static const char STATE[] = "java/lang/IllegalStateException";
static const char ARGUMENT[] = "java/lang/IllegalArgumentException";
static const char MEMORY[] = "java/lang/OutOfMemoryError";

/* Throws, unless the virtual machine has already done so. */
static void throw_new(JNIEnv *env, const char *type, const char *message) {
  if ((*env)->ExceptionCheck(env)) return;
  jclass found = (*env)->FindClass(env, type);
  if (found) (*env)->ThrowNew(env, found, message);
}

/* NULL, and an exception, if the model is closed. */
static tlr_model *opened(JNIEnv *env, jlong model) {
  if (!model) throw_new(env, STATE, "the classifier is closed");
  return (tlr_model *)(intptr_t)model;
}

JNIEXPORT jlong FUNCTION(load)(JNIEnv *env, jclass self, jstring bundle, jint network, jint threads) {
  if (!bundle) {
    throw_new(env, ARGUMENT, "no bundle given");
    return 0;
  }
  const char *path = (*env)->GetStringUTFChars(env, bundle, NULL);
  if (!path) {
    throw_new(env, MEMORY, "no memory for the path");
    return 0;
  }
  tlr_model *model = tlr_load(path, (tlr_which)network, threads);
  (*env)->ReleaseStringUTFChars(env, bundle, path);
  if (!model) throw_new(env, STATE, tlr_error());
  return (jlong)(intptr_t)model;
}

JNIEXPORT void FUNCTION(free)(JNIEnv *env, jclass self, jlong model) { tlr_free((tlr_model *)(intptr_t)model); }

JNIEXPORT jintArray FUNCTION(shape)(JNIEnv *env, jclass self, jlong handle) {
  const tlr_model *model = opened(env, handle);
  jintArray shape = model ? (*env)->NewIntArray(env, 4) : NULL;
  if (!shape) return NULL;
  jint values[4];
  for (int i = 0; i < 4; ++i) values[i] = (jint)tlr_input_shape(model)[i];
  (*env)->SetIntArrayRegion(env, shape, 0, 4, values);
  return shape;
}

JNIEXPORT jint FUNCTION(size)(JNIEnv *env, jclass self, jlong handle) {
  const tlr_model *model = opened(env, handle);
  return model ? (jint)tlr_output_size(model) : 0;
}

JNIEXPORT jfloatArray FUNCTION(compute)(JNIEnv *env, jclass self, jlong handle, jfloatArray images) {
  tlr_model *model = opened(env, handle);
  if (!model) return NULL;
  size_t size = tlr_input_size(model), floats = images ? (size_t)(*env)->GetArrayLength(env, images) : 0;
  if (floats == 0 || floats % size) {
    char message[128];
    snprintf(message, sizeof message, "an image has %zu floats; %zu are not a number of images", size, floats);
    throw_new(env, ARGUMENT, message);
    return NULL;
  }
  size_t count = floats / size, length = count * tlr_output_size(model);
  if (length > INT32_MAX) {
    throw_new(env, ARGUMENT, "too many images: their outputs do not fit into an array");
    return NULL;
  }
  jfloatArray outputs = (*env)->NewFloatArray(env, (jsize)length);
  if (!outputs) return NULL;
  jfloat *from = (*env)->GetFloatArrayElements(env, images, NULL);
  jfloat *to = from ? (*env)->GetFloatArrayElements(env, outputs, NULL) : NULL;
  int failed = to && tlr_run(model, from, count, to);
  if (to) (*env)->ReleaseFloatArrayElements(env, outputs, to, 0);
  if (from) (*env)->ReleaseFloatArrayElements(env, images, from, JNI_ABORT);
  if (!to) throw_new(env, MEMORY, "no memory for the images");
  if (failed) throw_new(env, STATE, tlr_error());
  return outputs;
}
