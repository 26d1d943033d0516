package org.tvmlowrank.example;

/**
 * A network of a bundle as a function of images: the C interface (tlr.h) for Java.
 *
 * <p>Images are float32, NCHW, one after another; so are outputs. Arrays of a wrong length are an
 * IllegalArgumentException, a closed classifier and whatever the library refuses an IllegalStateException. TVM keeps a
 * number of threads for each thread that calls it: run a classifier on the one that made it.
 */
public final class Classifier implements AutoCloseable {
  /** Which of a bundle's two networks, in the order of tlr_which. */
  public enum Network { COMPRESSED, DENSE }

  static {
    System.loadLibrary("tlr_jni");
  }

  private long model;

  /** The folder of a bundle; how many threads the network runs on, where 0 leaves that to TVM. */
  public Classifier(String bundle, Network network, int threads) {
    model = load(bundle, network.ordinal(), threads);
  }

  /** Images at a time (run takes any number), channels, height, width. */
  public synchronized int[] inputShape() {
    return shape(model);
  }

  /** Floats of the output of one image. */
  public synchronized int outputSize() {
    return size(model);
  }

  /** The outputs of one image or more. */
  public synchronized float[] run(float[] images) {
    return compute(model, images);
  }

  @Override
  public synchronized void close() {
    free(model);
    model = 0;
  }

  private static native long load(String bundle, int network, int threads);

  private static native void free(long model);

  private static native int[] shape(long model);

  private static native int size(long model);

  private static native float[] compute(long model, float[] images);
}
