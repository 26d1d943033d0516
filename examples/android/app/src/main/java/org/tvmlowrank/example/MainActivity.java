package org.tvmlowrank.example;

import android.app.Activity;
import android.graphics.Bitmap;
import android.graphics.BitmapFactory;
import android.os.Bundle;
import android.view.Gravity;
import android.widget.TextView;
import java.io.IOException;
import java.io.InputStream;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.util.Arrays;
import java.util.Locale;

/** Shows the class of assets/picture.jpg, by the network in assets/bundle, and how long it took. */
public final class MainActivity extends Activity {
  private static final int THREADS = 4;
  // "mean" and "std" of the images that the network was trained with, as in the manifest's "data"
  private static final float[] MEAN = {0.485f, 0.456f, 0.406f};
  private static final float[] STD = {0.229f, 0.224f, 0.225f};

  @Override
  protected void onCreate(Bundle state) {
    super.onCreate(state);
    TextView view = new TextView(this);
    view.setGravity(Gravity.CENTER);
    setContentView(view);
    new Thread(() -> {
      String answer = classify();
      runOnUiThread(() -> view.setText(answer));
    }).start();
  }

  private String classify() {
    try (Classifier classifier = new Classifier(unpacked().toString(), Classifier.Network.COMPRESSED, THREADS)) {
      float[] image = image(classifier.inputShape());
      long start = System.nanoTime();
      float[] scores = classifier.run(image);
      double ms = (System.nanoTime() - start) / 1e6;
      int best = 0;
      for (int i = 1; i < scores.length; ++i) {
        if (scores[i] > scores[best]) best = i;
      }
      return String.format(Locale.ROOT, "class %d, %.1f ms", best, ms);
    } catch (IOException | IllegalArgumentException | IllegalStateException error) {
      return error.toString();
    }
  }

  /** The folder of the bundle, which is copied out of the APK (libraries are loaded from files) when it is another. */
  private Path unpacked() throws IOException {
    Path folder = getFilesDir().toPath().resolve("bundle");
    Path manifest = folder.resolve("manifest.json");
    Path wanted = folder.resolve("wanted.json");
    Files.createDirectories(folder);
    copy("bundle/manifest.json", wanted);
    if (!Files.exists(manifest) || !Arrays.equals(Files.readAllBytes(manifest), Files.readAllBytes(wanted))) {
      copy("bundle/model.so", folder.resolve("model.so"));
      Files.move(wanted, manifest, StandardCopyOption.REPLACE_EXISTING);  // last: half a copy does not count
    }
    return folder;
  }

  private void copy(String asset, Path file) throws IOException {
    try (InputStream content = getAssets().open(asset)) {
      Files.copy(content, file, StandardCopyOption.REPLACE_EXISTING);
    }
  }

  /** The picture as the network takes it: red, green and blue planes of its size, normalised. */
  private float[] image(int[] shape) throws IOException {
    int height = shape[2];
    int width = shape[3];
    Bitmap picture;
    try (InputStream content = getAssets().open("picture.jpg")) {
      picture = BitmapFactory.decodeStream(content);
    }
    if (picture == null) throw new IOException("assets/picture.jpg is no picture");
    int[] pixels = new int[height * width];
    Bitmap.createScaledBitmap(picture, width, height, true).getPixels(pixels, 0, width, 0, 0, width, height);
    float[] image = new float[3 * pixels.length];
    for (int i = 0; i < image.length; ++i) {
      int channel = i / pixels.length;
      int value = pixels[i % pixels.length] >> (16 - 8 * channel) & 0xff;
      image[i] = (value / 255f - MEAN[channel]) / STD[channel];
    }
    return image;
  }
}
